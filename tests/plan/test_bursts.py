"""Bursts leave behind what single iterations leave behind, to the bit: wherever they end, and whatever ends them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.several import Several
from step.runs import interpret
from torch import nn

from fastrunner import EMAHook, EpochBasedRunner, FusedAdamW, FusedSGD, Hook, IterBasedRunner
from fastrunner.data.loader import EpochLoader
from fastrunner.data.order import BatchOrder
from fastrunner.plan import burst as bursts_module
from fastrunner.plan.burst import Bursts
from fastrunner.step import graph
from fastrunner.step.guards import quick_key

ITERS = 40


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def train_step(self, data_batch, optimizer=None, **kwargs):
        loss = (self.layer(data_batch["x"]) - data_batch["y"]).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=4)


def batches(count=7, odd=None):
    generator = torch.Generator().manual_seed(0)
    sizes = [3 if number == odd else 4 for number in range(count)]
    return [dict(x=torch.randn(n, 3, generator=generator), y=torch.randn(n, 2, generator=generator)) for n in sizes]


class Acts(Hook):
    """A user's, at some iterations; notes what is to be seen there."""

    def __init__(self, at, deed="looks"):
        self.at, self.deed, self.seen = sorted(at), deed, []

    def due(self, runner):
        return next((at for at in self.at if at >= runner.iter), 10**9)

    def after_train_iter(self, runner):
        loader, group = runner.data_loader, runner.optimizer.param_groups[0]
        self.seen.append((runner.iter, runner.epoch, runner.inner_iter, loader.position, loader.epoch, group["lr"]))
        self.seen.append(runner.model.layer.weight.tolist())
        self.seen.append(runner.outputs["log_vars"]["loss"].item())
        if self.deed == "writes the lr":
            group["lr"] = 0.7
        elif self.deed == "stops":
            runner.stop("asked to")
        elif self.deed == "raises" and runner.iter == self.at[-1]:
            raise ValueError("of a hook")
        elif self.deed == "saves":
            runner.save_checkpoint(runner.work_dir, create_symlink=False)


def make(optimizer="sgd", policy=None, every=10, hooks=(), ema=None, clip=0.5, iters=ITERS):
    torch.manual_seed(0)
    model = Model()
    made = FusedSGD(model.parameters(), lr=0.1, momentum=0.9) if optimizer == "sgd" else FusedAdamW(model.parameters(), lr=0.01)  # fmt: skip # noqa: E501
    runner = IterBasedRunner(
        model, optimizer=made, max_iters=iters, step="graph", work_dir=tempfile.mkdtemp(dir="."), meta={}
    )
    runner.register_training_hooks(
        policy or dict(policy="step", step=[10**6]),
        dict(grad_clip=None if clip is None else dict(max_norm=clip)),
        dict(interval=17, by_epoch=False),
        dict(interval=every, hooks=[dict(type="TextLoggerHook")]),
    )
    if ema is not None:
        runner.register_hook(EMAHook(momentum=0.1, interval=ema), priority=49)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def left_behind(runner):
    """Everything of a run but its times."""
    records = [json.loads(line) for file in Path(runner.work_dir).glob("*.json") for line in file.open()]
    logs = [{key: value for key, value in record.items() if "time" not in key} for record in records]
    histories = {key: values for key, values in runner.log_buffer.val_history.items() if "time" not in key}
    counts = {key: len(values) for key, values in runner.log_buffer.n_history.items()}
    slots = [
        {key: value.tolist() for key, value in slot.items() if isinstance(value, torch.Tensor)}
        for slot in runner.optimizer.state_dict()["state"].values()
    ]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in runner.optimizer.param_groups]
    return dict(
        weights={name: value.tolist() for name, value in runner.model.state_dict().items()},
        slots=slots,
        groups=groups,
        logs=logs,
        histories=histories,
        counts=counts,
        counters=(runner.iter, runner.epoch, runner.inner_iter),
        data=runner.loader_states(),
        workflow=runner.workflow_state(),
        files=sorted(path.name for path in Path(runner.work_dir).glob("*.pth")),
        seen=[hook.seen for hook in runner.hooks if isinstance(hook, Acts)],
        ema=[hook.state_dict() for hook in runner.hooks if isinstance(hook, EMAHook)],
    )


def run(runner, data, workflow=(("train", 1),)):
    """How it ended."""
    try:
        runner.run([data] * len(workflow), list(workflow))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return runner.stop_reason or "done"


POLICIES = [
    dict(policy="step", step=[10**6]),
    dict(policy="step", step=[9, 23], gamma=0.5, warmup="linear", warmup_iters=5),
    dict(policy="poly", power=0.9, min_lr=1e-4),
]


TRACED = {}


def traced_before(binding, batch, max_norm, step, trace=graph.trace_step, **options):
    """The same model was traced in an example before: half a second less."""
    key = binding.key, quick_key(batch), max_norm, *options.values()
    if key not in TRACED:
        TRACED[key] = trace(binding, batch, max_norm, step, **options)
    return TRACED[key]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["sgd", "adamw"]),
    st.sampled_from(POLICIES),
    st.integers(2, 20),
    st.sets(st.integers(0, ITERS - 1), max_size=3),
    st.sampled_from(["looks", "writes the lr", "stops", "raises", "saves"]),
    st.sets(st.integers(0, ITERS), max_size=4),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 2]),
    st.sampled_from([(("train", 1),), (("train", 7),), (("train", 5), ("train", 3))]),
    st.sampled_from([None, 0.5]),
)
def test_bursts_equal_single_iterations(optimizer, policy, every, at, deed, times, ema, odd, workflow, clip):
    """Random due points, and bursts that end early, at random places; batches of another shape among them."""
    ends = []
    for on in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            interpret(patch)
            patch.setattr(graph, "verify", lambda *args: None)  # that graphs are right is tested elsewhere
            patch.setattr(graph, "trace_step", traced_before)
            several = Several(end=lambda number: "time" if number in times else "")
            if on:
                several.install(patch)
            runner = make(optimizer, policy, every, [Acts(at, deed)], ema, clip)
            how = run(runner, batches(odd=odd), workflow)
            ends.append((how, left_behind(runner)))
    assert ends[0] == ends[1]


def both(monkeypatch, build, several, data=None):
    """The ends of a run by single iterations, and by bursts; and the bursts."""
    interpret(monkeypatch)
    single = build()
    ends = [(run(single, data or batches()), left_behind(single))]
    several.install(monkeypatch)
    runner = build()
    ends.append((run(runner, data or batches()), left_behind(runner)))
    return ends, several.lengths, runner


def used(runner):
    """Batches that count as used, of epochs of 7."""
    (state,) = runner.loader_states()
    return 7 * state["epoch"] + state["position"]


def test_there_are_bursts(monkeypatch):
    """Batches of an epoch of 20, a log every 10: what lies between is one call, but for those that others need."""
    ends, lengths, runner = both(monkeypatch, make, Several(), batches(20))
    assert ends[0] == ends[1]
    assert sum(lengths) > 20
    assert max(lengths) <= 10
    assert runner.current_plan().bursts.num_iters == sum(lengths)


def test_an_error_in_a_burst_is_that_of_its_iteration(monkeypatch):
    """As the loop does: the iterations before it count, its batch does not; a resume begins with it."""
    interpret(monkeypatch)
    Several(end=lambda at: "the step is broken" if at == 25 else "").install(monkeypatch)
    runner = make(policy=POLICIES[2])
    assert run(runner, batches()) == "RuntimeError: the step is broken"
    Several().install(monkeypatch)
    other = make(policy=POLICIES[2], hooks=[Acts([25], "stops")])
    run(other, batches())
    assert (runner.iter, runner.epoch, runner.inner_iter) == (25, 3, 1)
    assert used(runner) == 25
    assert runner.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]  # iteration 25's, begun
    assert len(runner.log_buffer.val_history["loss"]) == 25


def test_stop_is_heard_at_the_end_of_a_burst(monkeypatch):
    """Another thread, or a signal's handler, asks for it: the run ends between iterations, and goes on there."""
    interpret(monkeypatch)
    several = Several(during=lambda at: runner.stop("by another thread") if at == 13 else None).install(monkeypatch)
    runner = make()
    assert run(runner, batches()) == "by another thread"
    assert 14 <= runner.iter < 20  # the burst up to the log at 19 was under way
    assert used(runner) == runner.iter
    several.during = lambda at: None
    assert run(runner, batches()) == "done"
    whole = make()
    run(whole, batches())
    assert left_behind(runner)["weights"] == left_behind(whole)["weights"]


class Breaks(list):
    """Not exactly a list: its batches may not be made ahead of time."""


@pytest.mark.parametrize("data", [Breaks(batches()), tuple(batches())])
def test_only_batches_that_lie_ready_are_taken_ahead(monkeypatch, data):
    ends, lengths, _ = both(monkeypatch, make, Several(), data)
    assert ends[0] == ends[1]
    assert bool(lengths) == (type(data) is tuple)


class Broken(EpochLoader):
    """Batch 14 of each epoch was made ahead, and is an error; so it is what a burst would begin with."""

    num_ready = property(lambda self: 14 - self.position or 6)

    def __init__(self):
        self.order = BatchOrder(20, 1, seed=0)

    def _start(self, epoch, position):
        self._made = batches(20)

    def _stop(self):
        pass

    def _next(self):
        if self.position == 14:
            raise OSError("a broken sample")
        return self._made[self.position]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_burst_whose_first_batch_is_an_error(monkeypatch, optimizer):
    """The error is the batch's own, whether all rows of a burst are equal or, as Adam's, none."""
    interpret(monkeypatch)
    several = Several().install(monkeypatch)
    runner = make(optimizer, every=100)
    with pytest.raises(OSError, match="a broken sample"):
        runner.run([Broken()], [("train", 1)])
    assert several.lengths
    assert used(runner) == runner.iter == 14


def test_ctrl_c_while_batches_are_taken_loses_none(monkeypatch):
    interpret(monkeypatch)
    Several().install(monkeypatch)
    runner, constant = make(), bursts_module.LrRows.constant

    def interrupted(self, many, count):
        if self._first >= 12:
            raise KeyboardInterrupt
        return constant(self, many, count)

    monkeypatch.setattr(bursts_module.LrRows, "constant", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run([batches()], [("train", 1)])
    assert used(runner) == runner.iter
    assert runner.iter >= 12
    assert len(runner.log_buffer.val_history["loss"]) == runner.iter


def test_without_rule_9_somebody_can_tell(monkeypatch):
    """The bound at the nearest due point taken out: a hook that is due within a burst is not called."""

    def unbound(self, runner, loader, most):
        return min(most, runner._max_iters - 1 - runner._iter, loader.at_hand)

    def build():
        return make(hooks=[Acts([13, 27])])

    ends, _, _ = both(monkeypatch, build, Several())
    assert ends[0] == ends[1]
    monkeypatch.setattr(Bursts, "length", unbound)
    runner = build()
    run(runner, batches())
    assert left_behind(runner) != ends[0][1]


def test_explain_says_whether_there_are_bursts(monkeypatch):
    interpret(monkeypatch)
    runner = make()
    assert "no: the recipe calls its graphs from Python, one at a time" in runner.explain()
    Several().install(monkeypatch)
    runner = make()
    run(runner, batches())
    assert "bursts of" in runner.explain()


def test_a_warm_up_that_is_over_is_not_asked_again(monkeypatch):
    """From then on all rows of a burst are one."""
    interpret(monkeypatch)
    Several().install(monkeypatch)
    runner = make(policy=POLICIES[1])
    run(runner, batches(20))
    assert runner.current_plan().next_write > ITERS


def test_the_epoch_runner_says_that_it_has_none(monkeypatch):
    interpret(monkeypatch)
    Several().install(monkeypatch)
    runner = EpochBasedRunner(Model(), optimizer=FusedSGD(Model().parameters(), lr=0.1), max_epochs=1, step="graph")
    runner.register_training_hooks(None, {})
    assert "no: the epoch runner takes its batches one at a time" in runner.explain()
