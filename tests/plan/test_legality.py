"""Each rule of lowering: with it nobody can tell that anything was lowered, without it somebody can.

A scenario is run three times: in MMCV's plain order (``FASTRUNNER_PLAN=off``), with the plan, and with the plan but
without the rule. What a user could observe must be equal in the first two, to the bit, and must differ in the third.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn

import fastrunner.hooks.optimizer
import fastrunner.plan.lower
import fastrunner.plan.run_plan
from fastrunner import (
    CheckpointHook,
    EMAHook,
    EpochBasedRunner,
    FusedSGD,
    Hook,
    IterBasedRunner,
    IterTimerHook,
    OptimizerHook,
    TextLoggerHook,
)
from fastrunner.data.loader import EpochLoader
from fastrunner.data.order import BatchOrder
from fastrunner.hooks.logger.base import LoggerHook
from fastrunner.plan.due import DuePoints
from fastrunner.plan.iteration import Places
from fastrunner.plan.run_plan import RunPlan

ITERS = 12


def lr_of(runner) -> float:
    return runner.optimizer.param_groups[0]["lr"]


class OnlyAt(Hook):
    """Acts in some iterations and says so; the others are free to be lowered. Asked every time, it does the same."""

    at = (3, 7)

    def due(self, runner):
        return next((i for i in self.at if i >= runner.iter), 10**9)

    def before_train_iter(self, runner):
        if runner.iter in self.at:
            self.before(runner)

    def after_train_iter(self, runner):
        if runner.iter in self.at:
            self.after(runner)

    def before(self, runner):
        pass

    def after(self, runner):
        pass


@dataclass
class Scenario:
    """A run, and what of it is looked at. ``seen`` is a list that hooks and models append to."""

    hooks: Callable[[list], list[tuple[Hook, str]]] = lambda seen: []
    model: Callable[[list], nn.Module] = lambda seen: TinyModel()
    optimizer: Callable[[list, Any], Any] = lambda seen, params: FusedSGD(params, lr=0.2, momentum=0.9)
    optimizer_config: Callable[[], Any] = lambda: dict(grad_clip=dict(max_norm=0.3))
    policy: dict = field(default_factory=lambda: dict(policy="step", step=[5], warmup="linear", warmup_iters=2))
    runner: type = IterBasedRunner
    log_interval: int = 4
    recipe: str = "fused"
    timer: Any = field(default_factory=lambda: dict(type="IterTimerHook"))

    def observe(self, plan: str, monkeypatch) -> dict[str, Any]:
        monkeypatch.setenv("FASTRUNNER_PLAN", plan)
        monkeypatch.setenv("FASTRUNNER_STEP", self.recipe)
        torch.manual_seed(1)
        seen: list = []
        model = self.model(seen)
        optimizer = self.optimizer(seen, model.parameters())
        epochs = issubclass(self.runner, EpochBasedRunner)
        length = dict(max_epochs=ITERS // 3) if epochs else dict(max_iters=ITERS)
        folder = tempfile.mkdtemp(dir=".")
        runner = self.runner(model, optimizer=optimizer, work_dir=folder, **length)
        log = dict(interval=self.log_interval, hooks=[dict(type="TextLoggerHook", by_epoch=False)])
        checkpoint = dict(interval=5, by_epoch=False)
        runner.register_training_hooks(
            {"by_epoch": False, **self.policy}, self.optimizer_config(), checkpoint, log, timer_config=self.timer
        )
        for hook, priority in self.hooks(seen):
            runner.register_hook(hook, priority)
        runner.run([batches()], [("train", 1)])
        self.lowered = runner._plan.lowering is not None and bool(runner._plan.terms.hooks)
        records = [json.loads(line) for file in Path(folder).glob("*.json") for line in file.read_text().splitlines()]
        state = runner.optimizer.state_dict()
        return dict(
            seen=seen,
            weights={name: value.tolist() for name, value in runner.model.state_dict().items()},
            grads=[None if p.grad is None else p.grad.tolist() for p in runner.model.parameters()],
            momenta=[slot["momentum_buffer"].tolist() for slot in state["state"].values()],
            groups=[{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
            logs=[{k: v for k, v in record.items() if "time" not in k} for record in records],
            files=sorted(path.name for path in Path(folder).glob("*.pth")),
            counters=(runner.iter, runner.epoch, runner.inner_iter),
        )


# Rule 1: exact types only.


class Scales(OptimizerHook):
    def after_train_iter(self, runner):
        runner.outputs["loss"] = runner.outputs["loss"] * 3
        super().after_train_iter(runner)


class CountsAverages(EMAHook):
    seen: list

    def after_train_iter(self, runner):
        self.seen.append(runner.iter)


class SlowTimer(IterTimerHook):
    seen: list

    def after_iter(self, runner):
        self.seen.append(runner.iter)


class Strict(FusedSGD):
    """A user's optimizer, which relies on gradients being clipped when ``step`` begins."""

    def __init__(self, params, seen):
        self.seen = seen
        super().__init__(params, lr=0.2)

    def step(self, closure=None, *, max_norm=None, write_back=True, ema=None, zero=False):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen.append(round(float(torch.stack([g.norm() for g in grads]).norm()), 3))
        return super().step(closure, ema=ema)


def with_(hook: Hook, seen: list) -> Hook:
    hook.seen = seen
    return hook


def shadowed_optimizer_hook() -> OptimizerHook:
    hook = OptimizerHook(dict(max_norm=0.3))
    original = hook.after_train_iter

    def tripled(runner):
        runner.outputs["loss"] = runner.outputs["loss"] * 3
        original(runner)

    hook.after_train_iter = tripled
    return hook


def watched_optimizer(seen, params):
    optimizer = FusedSGD(params, lr=0.2, momentum=0.9)

    def look(optimizer, args, kwargs):
        seen.append([p.grad.tolist() for p in optimizer.param_groups[0]["params"]])

    optimizer.register_step_pre_hook(look)
    return optimizer


def wrapped_step(seen, params):
    """What torch's lr schedulers do."""
    optimizer = FusedSGD(params, lr=0.2, momentum=0.9)
    step = optimizer.step

    def counted(*args, **kwargs):
        seen.append([p.grad.tolist() for p in optimizer.param_groups[0]["params"]])
        return step(*args, **kwargs)

    optimizer.step = counted
    return optimizer


class OwnRunIter(IterBasedRunner):
    def run_iter(self, data_batch, train_mode, **kwargs):
        super().run_iter(data_batch, train_mode, **kwargs)
        self.outputs["loss"] = self.outputs["loss"] * lr_of(self)
        self.optimizer.param_groups[0]["lr"] = 7.0


class OwnTrain(EpochBasedRunner):
    def train(self, data_loader, **kwargs):
        self.call_hook = self.traced
        super().train(data_loader, **kwargs)

    def traced(self, stage):
        self.hooks[0].seen.append(stage)
        type(self).call_hook(self, stage)


# Rule 2: the order, decided for each iteration.


class Doubles(OnlyAt):
    def after(self, runner):
        runner.outputs["loss"] = runner.outputs["loss"] * 2


class BetweenUpdateAndAverage(OnlyAt):
    def after(self, runner):
        with torch.no_grad():
            runner.model.layer.weight.mul_(1.5)


# Rule 3: gradients.


class LooksAtGradients(OnlyAt):
    seen: list

    def after(self, runner):
        self.seen.append([p.grad.tolist() for p in runner.model.parameters()])
        self.seen.append(runner.outputs["loss"].grad_fn is not None)

    def before(self, runner):
        self.seen.append([None if p.grad is None else p.grad.tolist() for p in runner.model.parameters()])


class SometimesUnused(nn.Module):
    """One of its layers takes part in every second iteration only: between them it must not move."""

    def __init__(self):
        super().__init__()
        self.layer, self.other, self.count = nn.Linear(2, 1), nn.Linear(2, 1), 0

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.count += 1
        out = self.layer(data_batch) + (self.other(data_batch) if self.count % 2 else 0)
        loss = out.square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(data_batch))


# Rule 4: what Python sees is the truth.


class WritesLr(OnlyAt):
    seen: list

    def after(self, runner):
        self.seen.append((lr_of(runner), type(lr_of(runner)).__name__))
        self.seen.append([slot["momentum_buffer"].tolist() for slot in runner.optimizer.state.values()])
        runner.optimizer.param_groups[0]["lr"] = 0.01


class ChangesWhatFoldingRestsOn(OnlyAt):
    """In the middle of a run: other arguments for clipping, a group more, a step hook, a wrapped step."""

    at = (4,)

    def __init__(self, what, seen):
        self.what, self.seen = what, seen

    def after(self, runner):
        hook = next(hook for hook in runner.hooks if isinstance(hook, OptimizerHook))
        if self.what == "max_norm":
            hook.grad_clip["max_norm"] = 0.05
        elif self.what == "norm_type":
            hook.grad_clip = dict(max_norm=0.3, norm_type=1)
        elif self.what == "no clipping":
            hook.grad_clip = None
        elif self.what == "a group":
            runner.optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], lr=0.1))
        elif self.what == "a step hook":
            runner.optimizer.register_step_pre_hook(self.look)
        else:
            step = runner.optimizer.step
            runner.optimizer.step = lambda *args, **kwargs: (self.look(runner.optimizer), step(*args, **kwargs))[1]

    def look(self, optimizer, *_):
        self.seen.append([p.grad.tolist() for p in optimizer.param_groups[0]["params"]])


class Bystander(Hook):
    """A user's hook that is called at every iteration."""

    def after_train_iter(self, runner):
        pass


# Rule 6: a plan that is stale is made again.


class Replaces(OnlyAt):
    at = (4,)

    def __init__(self, what, stage):
        self.what = what
        setattr(self, stage.removesuffix("_train_iter"), self.replace)

    def replace(self, runner):
        if self.what == "model":
            torch.manual_seed(5)
            runner.model = TinyModel()
            runner.optimizer = FusedSGD(runner.model.parameters(), lr=0.2, momentum=0.9)
        elif self.what == "optimizer":
            runner.optimizer = FusedSGD(runner.model.parameters(), lr=0.2)
        elif self.what == "hooks":
            runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, OptimizerHook)]
        else:
            runner._hooks.remove(next(hook for hook in runner.hooks if isinstance(hook, OptimizerHook)))


class ReplacesItself(TinyModel):
    """Not a hook but the model changes the run, in the middle of a stretch in which nobody is called."""

    runner: Any = None
    count = 0

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.count += 1
        if self.count == 7:
            hooks = self.runner._hooks
            hooks.remove(next(hook for hook in hooks if isinstance(hook, OptimizerHook)))
        return super().train_step(data_batch, optimizer, **kwargs)


class Introduces(Hook):
    """Lets the model know the runner, as some projects do."""

    def before_run(self, runner):
        runner.model.runner = runner


# Rule 8: loggers and checkpoint hooks stay objects that others find.


class Finds(OnlyAt):
    at = (1,)

    def after(self, runner):
        for hook in runner.hooks:
            if isinstance(hook, (CheckpointHook, TextLoggerHook)):
                hook.interval = 2


def nothing(*args, **kwargs):
    return None


def late_places(plan, called):
    """``_places`` as if a hook between forward and backward could as well run after the update."""
    terms, places = ORIGINAL_PLACES(plan, called)
    return terms, Places(places.before, places.late, (), places.between + places.after, places.last)


ORIGINAL_PLACES = RunPlan._places
LOWER, OPTIMIZER = fastrunner.plan.lower, fastrunner.hooks.optimizer


def drop(target: Any, name: str, without: Any = nothing) -> Callable[[Any], None]:
    return lambda monkeypatch: monkeypatch.setattr(target, name, without)


RULES: dict[str, tuple[Scenario, Callable[[Any], None]]] = {
    "1 a subclass of OptimizerHook": (
        Scenario(optimizer_config=lambda: Scales(dict(max_norm=0.3))),
        drop(LOWER, "refuse_type"),
    ),
    "1 an attribute that shadows a method": (
        Scenario(optimizer_config=shadowed_optimizer_hook),
        drop(LOWER, "refuse_type"),
    ),
    "1 a subclass of EMAHook": (
        Scenario(hooks=lambda seen: [(with_(CountsAverages(), seen), 45)]),
        drop(LOWER, "refuse_type"),
    ),
    "1 a subclass of the optimizer": (
        Scenario(optimizer=lambda seen, params: Strict(params, seen)),
        drop(OPTIMIZER, "is_fused", lambda optimizer: True),
    ),
    "1 step hooks": (Scenario(optimizer=watched_optimizer), drop(OPTIMIZER, "watches_step")),
    "1 a replaced step": (Scenario(optimizer=wrapped_step), drop(OPTIMIZER, "watches_step")),
    "1 an overridden run_iter": (
        Scenario(runner=OwnRunIter, policy=dict(policy="fixed")),
        drop(LOWER, "is_replaced", lambda runner, name: False),
    ),
    "2 between forward and backward": (
        Scenario(hooks=lambda seen: [(Doubles(), "HIGH")]),
        drop(RunPlan, "_places", late_places),
    ),
    "2 an average of weights before the update": (
        Scenario(hooks=lambda seen: [(EMAHook(momentum=0.3), "HIGH")]),
        drop(LOWER, "refuse_ema"),
    ),
    "4 a hook's lr": (
        Scenario(hooks=lambda seen: [(with_(WritesLr(), seen), "NORMAL")], policy=dict(policy="fixed")),
        drop(fastrunner.plan.run_plan, "is_ours", lambda hook: True),
    ),
    "5 another norm": (
        Scenario(optimizer_config=lambda: dict(grad_clip=dict(max_norm=0.3, norm_type=1))),
        drop(OptimizerHook, "refuse_fold"),
    ),
    "5 clipping of other parameters": (
        Scenario(optimizer=lambda seen, params: FusedSGD([next(iter(params))], lr=0.2, momentum=0.9)),
        drop(OptimizerHook, "refuse_fold"),
    ),
    **{
        f"6 {what} replaced at {stage}": (
            Scenario(hooks=lambda seen, what=what, stage=stage: [(Replaces(what, stage), "HIGH")]),
            drop(RunPlan, "mark_stale"),
        )
        for what in ("model", "optimizer")
        for stage in ("before_train_iter", "after_train_iter")
    },
    "6 the model changes the hooks": (
        Scenario(model=lambda seen: ReplacesItself(), hooks=lambda seen: [(Introduces(), "NORMAL")]),
        drop(RunPlan, "mark_stale"),
    ),
    "8 intervals changed through runner.hooks": (
        Scenario(hooks=lambda seen: [(Finds(), "NORMAL")], log_interval=6),
        drop(DuePoints, "somebody_acted"),
    ),
}
HOLDS = {
    "1 a subclass of IterTimerHook": Scenario(timer=None, hooks=lambda seen: [(with_(SlowTimer(), seen), "LOW")]),
    "1 an overridden train": Scenario(runner=OwnTrain, hooks=lambda seen: [(with_(Hook(), seen), "HIGHEST")]),
    "2 a hook between update and average": Scenario(
        hooks=lambda seen: [(BetweenUpdateAndAverage(), "NORMAL"), (EMAHook(momentum=0.3), "NORMAL")]
    ),
    "2 both, in the epoch runner": Scenario(
        runner=EpochBasedRunner, hooks=lambda seen: [(Doubles(), "HIGH"), (EMAHook(momentum=0.3, interval=2), "NORMAL")]
    ),
    "3 gradients at due points": Scenario(hooks=lambda seen: [(with_(LooksAtGradients(), seen), "NORMAL")]),
    "3 unused parameters": Scenario(model=lambda seen: SometimesUnused()),
    **{
        f"6 {what} at {stage}": Scenario(hooks=lambda seen, what=what, stage=stage: [(Replaces(what, stage), "HIGH")])
        for what in ("hooks", "remove")
        for stage in ("before_train_iter", "after_train_iter")
    },
    **{
        f"5 {what}, beside {'a hook that is always called' if always else 'nobody'}": Scenario(
            hooks=lambda seen, what=what, always=always: [
                (ChangesWhatFoldingRestsOn(what, seen), "NORMAL"),
                *([(Bystander(), "NORMAL")] if always else []),
            ]
        )
        for what in ("max_norm", "norm_type", "no clipping", "a group", "a step hook", "a wrapped step")
        for always in (False, True)
    },
    "an average": Scenario(hooks=lambda seen: [(EMAHook(), "NORMAL")]),
    "torch's optimizer": Scenario(
        optimizer=lambda seen, params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
        hooks=lambda seen: [(EMAHook(interval=3), "NORMAL")],
        recipe="eager",  # the default takes the norm itself, more exactly than torch: other last bits
    ),
    "no clipping": Scenario(optimizer_config=dict, runner=EpochBasedRunner),
    "a policy that changes all the time": Scenario(policy=dict(policy="poly", power=0.9, min_lr=1e-3)),
}


@pytest.mark.parametrize("name", RULES)
def test_with_the_rule_nobody_can_tell_and_without_it_somebody_can(name, monkeypatch):
    scenario, remove = RULES[name]
    plain = scenario.observe("off", monkeypatch)
    assert scenario.observe("on", monkeypatch) == plain
    remove(monkeypatch)
    try:
        without = scenario.observe("on", monkeypatch)
    except Exception:  # without the rule the run does not even get to its end
        return
    assert without != plain


@pytest.mark.parametrize("name", HOLDS)
def test_nobody_can_tell(name, monkeypatch):
    scenario = HOLDS[name]
    plain = scenario.observe("off", monkeypatch)
    assert scenario.observe("on", monkeypatch) == plain
    if "overridden" not in name:
        assert scenario.lowered


def test_loggers_and_checkpoint_hooks_stay_where_others_look_for_them(monkeypatch):
    class Looks(OnlyAt):
        def after(self, runner):
            found.append([type(hook).__name__ for hook in runner.hooks])

    found: list = []
    Scenario(hooks=lambda seen: [(Looks(), "NORMAL")]).observe("on", monkeypatch)
    for names in found:
        assert {"CheckpointHook", "TextLoggerHook", "IterTimerHook", "OptimizerHook"} <= set(names)
    assert len(found) == 2
    assert issubclass(TextLoggerHook, LoggerHook)


def test_raw_writes_have_a_new_version_once_a_step(monkeypatch):
    """Rule 11: a graph that saved the weights before the update fails, as it does with torch's optimizer."""
    stale: list = []

    class Keeps(OnlyAt):
        at = (3, 4)

        def before(self, runner):
            weight = runner.model.layer.weight
            if runner.iter == 3:
                stale.append((weight * weight).sum())
            else:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    stale.pop().backward()
                stale.append("failed as it should")

    Scenario(hooks=lambda seen: [(Keeps(), "HIGHEST")]).observe("on", monkeypatch)
    assert stale == ["failed as it should"]


class Ahead(EpochLoader):
    """Reads its data set one batch ahead, over an epoch's end too where that is allowed."""

    def __init__(self):
        self.order = BatchOrder(12, batch_size=4, seed=0)
        self.data = torch.arange(24.0).reshape(12, 2) / 24
        self.ready = []

    def _make(self, epoch, position):
        return (epoch, position), self.data[4 * position : 4 * position + 4].clone()

    def _start(self, epoch, position):
        if not self.ready or self.ready[0][0] != (epoch, position):
            self.ready = [self._make(epoch, position)]

    def _next(self):
        (epoch, position), batch = self.ready.pop(0)
        if position + 1 < len(self):
            self.ready.append(self._make(epoch, position + 1))
        elif self.prefetch_over_epoch_end:
            self.ready.append(self._make(epoch + 1, 0))
        return batch

    def _stop(self):
        self.ready = []


class ChangesTheData(Hook):
    """As hooks that switch pipelines or image sizes do."""

    def after_train_epoch(self, runner):
        runner.data_loader.data.mul_(-2)


@pytest.mark.parametrize("hooks", [[], [EMAHook], [ChangesTheData]], ids=["none", "ours", "a user's"])
def test_no_batch_is_made_before_a_hook_could_change_the_data(hooks, monkeypatch):
    """Rule 7."""
    allowed: list = []

    class Sees(TinyModel):
        def train_step(self, data_batch, optimizer=None, **kwargs):
            allowed.append(loader.prefetch_over_epoch_end)
            return super().train_step(data_batch, optimizer, **kwargs)

    def weights(plan):
        nonlocal loader
        monkeypatch.setenv("FASTRUNNER_PLAN", plan)
        torch.manual_seed(1)
        model, loader = Sees(), Ahead()
        runner = EpochBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.2), max_epochs=3)
        runner.register_training_hooks(None, {}, None, None)
        for hook in hooks:
            runner.register_hook(hook())
        runner.run([loader], [("train", 1)])
        return {name: value.tolist() for name, value in model.state_dict().items()}

    loader = None
    plain = weights("off")
    assert not any(allowed)
    allowed.clear()
    assert weights("on") == plain
    assert set(allowed) == {ChangesTheData not in hooks}
    assert not loader.prefetch_over_epoch_end  # given back
    monkeypatch.setattr(fastrunner.plan.run_plan, "refuse_prefetch", nothing)
    assert (weights("on") == plain) == (ChangesTheData not in hooks)


class Shortens(Hook):
    """Every hook and step may end a run early by writing its length."""

    def after_train_iter(self, runner):
        if runner.iter == 4:
            runner._max_iters = 8


class ShortensDue(Shortens):
    def due(self, runner):
        return 4 if runner.iter <= 4 else 10**9


class ShortensItself(TinyModel):
    runner: Any = None
    count = 0

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.count += 1
        if self.count == 5:
            self.runner._max_iters = 8
        return super().train_step(data_batch, optimizer, **kwargs)


@pytest.mark.parametrize("plan", ["on", "off"])
@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(hooks=lambda seen: [(Shortens(), "NORMAL")]),
        Scenario(hooks=lambda seen: [(ShortensDue(), "NORMAL")]),
        Scenario(model=lambda seen: ShortensItself(), hooks=lambda seen: [(Introduces(), "NORMAL")]),
    ],
    ids=["always called", "due", "the model"],
)
def test_the_length_of_a_run_may_be_written_at_any_time(scenario, plan, monkeypatch):
    observed = scenario.observe(plan, monkeypatch)
    assert observed["counters"][0] == 8
    assert "iter_8.pth" in observed["files"]  # save_last
