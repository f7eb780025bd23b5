"""Accumulation as two CUDA graphs, and a loss scale on the device: on the stand-in, as eager does."""

from __future__ import annotations

import pytest
import torch
from step.captured_runs import captured_of, on_stand_in
from step.runs import state_of
from step.test_window import HALF, PLAIN_SGD, Acts, run
from step.zoo import ZOO

from fastrunner import (
    EMAHook,
    Fp16OptimizerHook,
    GradientCumulativeFp16OptimizerHook,
    GradientCumulativeOptimizerHook,
)

MLP = ZOO["mlp"]


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    return on_stand_in(monkeypatch)


def compare(family, make, least, rtol=1e-5, **options):
    ours, mine = run(family, "cudagraph", make(), **options)
    eager, theirs = run(family, "eager", make(), **options)
    assert captured_of(ours).num_calls >= least, captured_of(ours).explain()
    assert mine.losses == pytest.approx(theirs.losses, rel=rtol, nan_ok=True)
    assert (mine.norms is None) == (theirs.norms is None)
    if theirs.norms is not None:
        assert mine.norms == pytest.approx(theirs.norms, rel=20 * rtol, nan_ok=True)
    assert [p.grad is None for p in ours.model.parameters()] == [p.grad is None for p in eager.model.parameters()]
    for name, value in state_of(eager).items():
        if name.endswith(" step"):
            assert torch.equal(state_of(ours)[name], value)
    return ours, eager


@pytest.mark.parametrize("family", [MLP, PLAIN_SGD, ZOO["recommender"]], ids=["adamw", "sgd", "unused"])
def test_accumulation_is_two_graphs(family):
    clip = None if family.clip is None else dict(max_norm=family.clip)
    ours, _ = compare(family, lambda: GradientCumulativeOptimizerHook(3, grad_clip=clip), 8, iters=29)
    assert len(captured_of(ours).graphs) == 2


def test_windows_go_on_below_and_back_with_an_average_in_every_iteration():
    compare(
        MLP,
        lambda: GradientCumulativeOptimizerHook(3, grad_clip=dict(max_norm=0.5)),
        8,
        iters=37,
        hooks=[lambda: Acts(19, 26), lambda: EMAHook(momentum=0.1)],
    )


@pytest.mark.parametrize("scale", [64.0, "dynamic", dict(init_scale=256.0, growth_interval=3)])
def test_a_loss_scale_is_part_of_the_graph(scale):
    huge = [HALF.batch(number) for number in range(4)]
    huge[2]["x"] *= 1e5 if scale != 64.0 else 1.0
    # float16: the scale's powers of two change no bits, sums of float16 products do
    ours, eager = compare(HALF, lambda: Fp16OptimizerHook(dict(max_norm=0.5), loss_scale=scale), 4, 1e-3, iters=24, batches=huge)  # fmt: skip # noqa: E501
    mine, theirs = (next(h for h in r.hooks if isinstance(h, Fp16OptimizerHook)).loss_scaler for r in (ours, eager))
    assert mine.state_dict() == theirs.state_dict()


def test_both_together():
    compare(HALF, lambda: GradientCumulativeFp16OptimizerHook(2, loss_scale="dynamic"), 4, 1e-3, iters=30)


def test_a_checkpoint_inside_a_window_holds_the_gradients_so_far(tmp_path):
    def make():
        return GradientCumulativeOptimizerHook(4)

    saves = lambda: Acts(25, act=lambda runner: runner.save_checkpoint(str(tmp_path), "inside.pth"))  # noqa: E731
    whole, losses = run(MLP, "cudagraph", make(), iters=40, hooks=[saves])
    assert captured_of(whole).num_calls > 4
    resumed, rest = run(MLP, "cudagraph", make(), iters=40, resume=tmp_path / "inside.pth", folder="again")
    assert rest.losses == pytest.approx(losses.losses[-len(rest.losses) :], rel=1e-5)
    for name, value in state_of(whole).items():
        torch.testing.assert_close(state_of(resumed)[name], value, rtol=1e-4, atol=1e-6)
