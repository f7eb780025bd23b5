"""Accumulation and a loss scale inside graphs: the same as eager, also where recipes take turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from step.runs import LossHook, graph_of, interpret, state_of
from step.zoo import ZOO, Model, vectors
from torch import nn

from fastrunner import (
    Bf16OptimizerHook,
    EMAHook,
    EpochBasedRunner,
    Fp16OptimizerHook,
    GradientCumulativeFp16OptimizerHook,
    GradientCumulativeOptimizerHook,
    Hook,
    IterBasedRunner,
    auto_fp16,
)

MLP = ZOO["mlp"]


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch):
    if "inductor_cache" not in request.fixturenames:
        interpret(monkeypatch)


class Half(nn.Module):
    """An MLP whose forward the half-precision hooks switch; ``huge`` batches overflow float16 under a large scale."""

    def __init__(self):
        super().__init__()
        self.body, self.fp16_enabled = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10)), False

    @auto_fp16(apply_to=("x",))
    def forward(self, x):
        return self.body(x)

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = nn.functional.cross_entropy(self(batch["x"]).float(), batch["y"])
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch["y"]))


HALF = replace(MLP, model=Half)
PLAIN_SGD = replace(MLP, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), clip=None)


class Acts(Hook):
    """A user's hook that says when it is due: that iteration runs below."""

    def __init__(self, *places, act=lambda runner: None):
        self.places, self.act = places, act

    def due(self, runner):
        return min((at for at in self.places if at >= runner.iter), default=1 << 40)

    def after_train_iter(self, runner):
        if runner.iter in self.places:
            self.act(runner)


def run(family, recipe, hook, iters=19, hooks=(), kind=IterBasedRunner, batches=None, resume=None, folder="out"):
    torch.manual_seed(0)
    model = family.model()
    length = dict(max_epochs=iters) if kind is EpochBasedRunner else dict(max_iters=iters)
    runner = kind(model, optimizer=family.optimizer(model.parameters()), step=recipe, work_dir=str(folder), **length)
    runner.register_training_hooks(dict(policy="step", step=[9], by_epoch=False), hook)
    losses = LossHook()
    for each in (losses, *(make() for make in hooks)):
        runner.register_hook(each, priority=49)
    torch.manual_seed(3)
    if resume is not None:
        runner.resume(str(resume))
    runner.run([batches or [family.batch(i) for i in range(4)]], [("train", 1)])
    return runner, losses


def compare(family, make, least, rtol=1e-5, **options):
    ours, mine = run(family, "graph", make(), **options)
    eager, theirs = run(family, "eager", make(), **options)
    assert graph_of(ours) is not None, "the hook is not lowered"
    assert graph_of(ours).num_calls >= least, graph_of(ours).explain()
    assert mine.losses == pytest.approx(theirs.losses, rel=rtol)
    if theirs.norms is None:
        assert mine.norms is None
    else:
        assert mine.norms == pytest.approx(theirs.norms, rel=20 * rtol, nan_ok=True)  # one entry an update
    assert [p.grad is None for p in ours.model.parameters()] == [p.grad is None for p in eager.model.parameters()]
    for name, value in state_of(eager).items():
        if name.endswith(" step"):
            assert torch.equal(state_of(ours)[name], value)
    return ours, eager


@pytest.mark.parametrize("family", [MLP, PLAIN_SGD, ZOO["recommender"]], ids=["adamw", "sgd", "unused"])
def test_accumulation_is_two_graphs(family):
    clip = None if family.clip is None else dict(max_norm=family.clip)

    def make():
        return GradientCumulativeOptimizerHook(3, grad_clip=clip)

    ours, _ = compare(family, make, 12)
    assert len(graph_of(ours)._graphs) == 2


def test_accumulation_with_an_average_epochs_and_a_remainder():
    def make():
        return GradientCumulativeOptimizerHook(4)

    average = dict(hooks=[lambda: EMAHook(momentum=0.1, interval=2)])
    ours, _ = compare(MLP, make, 8, kind=EpochBasedRunner, iters=3, batches=[vectors(i) for i in range(6)], **average)
    assert len(graph_of(ours)._graphs) >= 2


def test_a_hook_in_the_middle_of_a_window_finds_what_has_added_up():
    seen = []

    def look(runner):
        seen.append([None if p.grad is None else p.grad.clone() for p in runner.model.parameters()])

    compare(MLP, lambda: GradientCumulativeOptimizerHook(3), 8, hooks=[lambda: Acts(9, 11, 13, act=look)])
    half = len(seen) // 2
    for ours, eager in zip(seen[:half], seen[half:], strict=True):
        for mine, theirs in zip(ours, eager, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_resume_inside_a_window_is_exact(tmp_path):
    def make():
        return GradientCumulativeOptimizerHook(3, grad_clip=dict(max_norm=0.5))

    def save(runner):
        runner.save_checkpoint(str(tmp_path), "at_{}.pth")

    whole, _ = run(MLP, "graph", make(), hooks=[lambda: Acts(10, act=save)], folder=tmp_path / "a")
    (path,) = tmp_path.glob("at_*.pth")
    again, _ = run(MLP, "graph", make(), hooks=[lambda: Acts(10)], resume=path, folder=tmp_path / "b")
    assert graph_of(again).num_calls >= 6
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(again)[name], value), name


HALF_SGD = replace(HALF, optimizer=ZOO["resnet"].optimizer)


@pytest.mark.parametrize(
    ("family", "scale", "iters"),
    [
        (HALF, "dynamic", 12),
        (HALF, dict(init_scale=2.0**40, growth_interval=4), 40),  # overflows, many times
        (HALF_SGD, 512.0, 12),
        (HALF_SGD, dict(init_scale=2.0**14, growth_interval=3), 16),
    ],
    ids=["dynamic", "overflows", "fixed", "grows"],
)
def test_a_loss_scale_is_kept_on_the_device(family, scale, iters):
    def make():
        return Fp16OptimizerHook(grad_clip=dict(max_norm=1.0), loss_scale=scale)

    ours, eager = compare(family, make, 5, rtol=2e-3, iters=iters)
    (mine,), (theirs,) = ([h.loss_scaler for h in r.hooks if isinstance(h, Fp16OptimizerHook)] for r in (ours, eager))
    assert mine.state_dict() == theirs.state_dict()


def test_an_update_that_overflows_is_left_out_inside_the_graph():
    """The scale is made so large by a hook that the next graph overflows, several times in a row."""

    def enlarge(runner):
        (hook,) = (h for h in runner.hooks if isinstance(h, Fp16OptimizerHook))
        hook.loss_scaler._scale.fill_(2.0**60)

    def make():
        return Fp16OptimizerHook(loss_scale="dynamic")

    hooks = dict(hooks=[lambda: Acts(6, act=enlarge)])
    _, eager = compare(HALF, make, 30, rtol=2e-3, iters=60, **hooks)
    for name, value in state_of(eager).items():
        if name.endswith(" step"):
            assert value < 50  # updates were left out, in graphs: only the one at iteration 6 ran below


def test_accumulation_with_a_loss_scale():
    def make():
        return GradientCumulativeFp16OptimizerHook(cumulative_iters=3, loss_scale=dict(init_scale=2.0**10))

    ours, _ = compare(HALF, make, 10, rtol=2e-3)
    assert len(graph_of(ours)._graphs) == 2


def test_bfloat16_is_a_plain_update():
    compare(HALF, lambda: Bf16OptimizerHook(grad_clip=dict(max_norm=1.0)), 15, rtol=2e-2)


class Sub(GradientCumulativeOptimizerHook):
    pass


def test_what_would_be_noticed_is_called_and_named():
    runner, losses = run(MLP, "graph", Sub(3))
    assert losses.losses == run(MLP, "fused", Sub(3))[1].losses
    assert runner.current_plan().graph is None
    assert "a subclass of OptimizerHook" in runner.explain()

    hook = Fp16OptimizerHook()
    hook.loss_scaler.unscale_ = hook.loss_scaler.unscale_
    runner, _ = run(HALF, "graph", hook)
    assert any("the loss scaler is not exactly" in line for line in graph_of(runner).explain())


def test_other_parameters_with_gradients_for_another_shape_stay_below():
    class Forks(Model):
        def __init__(self):
            super().__init__(nn.Linear(16, 10))
            self.other = nn.Linear(16, 10)

        def train_step(self, batch, optimizer=None, **kwargs):
            layer = self.body if len(batch["y"]) == 8 else self.other
            loss = nn.functional.cross_entropy(layer(batch["x"]), batch["y"])
            return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch["y"]))

    family = replace(PLAIN_SGD, model=Forks)
    odd = [vectors(i, size=8 if i % 4 else 5) for i in range(8)]
    ours, _ = compare(family, lambda: GradientCumulativeOptimizerHook(2), 4, iters=24, batches=odd)
    assert any("other parameters get gradients" in line for line in graph_of(ours).explain())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled(inductor_cache):
    compare(MLP, lambda: GradientCumulativeOptimizerHook(3, grad_clip=dict(max_norm=0.5)), 12)
    compare(HALF, lambda: Fp16OptimizerHook(loss_scale="dynamic"), 15, rtol=2e-3)
