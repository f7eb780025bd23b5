"""GradientCumulativeOptimizerHook: one big batch, resumes inside a window, what mmcv's own tests pin, bad input."""

from __future__ import annotations

import logging

import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn

from fastrunner import (
    CheckpointHook,
    ClosureHook,
    EpochBasedRunner,
    FusedSGD,
    GradientCumulativeFp16OptimizerHook,
    GradientCumulativeOptimizerHook,
    IterBasedRunner,
)

KINDS = [EpochBasedRunner, IterBasedRunner]


def make(kind, hook, length=None, work_dir="out", model=None, optimizer=FusedSGD):
    torch.manual_seed(0)
    model = model or TinyModel()
    length = length or (dict(max_epochs=2) if kind is EpochBasedRunner else dict(max_iters=8))
    runner = kind(model, optimizer=optimizer(model.parameters(), lr=0.1, momentum=0.9), work_dir=work_dir, **length)
    runner.register_optimizer_hook(hook)
    return runner


@pytest.mark.parametrize("clip", [None, dict(max_norm=0.05)])
@pytest.mark.parametrize("optimizer", [FusedSGD, torch.optim.SGD])
def test_three_small_batches_are_one_big_one(optimizer, clip):
    small = batches(7, size=2)
    runner = make(IterBasedRunner, dict(type="GradientCumulativeOptimizerHook", cumulative_iters=3, grad_clip=clip),
                  dict(max_iters=7), optimizer=optimizer)  # fmt: skip
    runner.run([small], [("train", 1)])
    big = [torch.cat(small[:3]), torch.cat(small[3:6]), small[6]]
    whole = make(IterBasedRunner, dict(grad_clip=clip), dict(max_iters=3), optimizer=optimizer)
    whole.run([big], [("train", 1)])
    for p, q in zip(runner.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # sums of six values in another order
    norms = [run.log_buffer.val_history.get("grad_norm", []) for run in (runner, whole)]
    assert len(norms[0]) == (3 if clip else 0)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(1, 8))
def test_a_resume_anywhere_in_a_window_is_exact(kind, at, fp16):
    """Four iterations an epoch, windows of three: they cross the epoch's end, and the last one is of two."""

    def hook():
        if fp16:
            return GradientCumulativeFp16OptimizerHook(3, loss_scale="dynamic")
        return GradientCumulativeOptimizerHook(3)

    def go(work_dir, resume=None):
        runner = make(kind, hook(), work_dir=work_dir)
        runner.register_hook(CheckpointHook(1, by_epoch=False))
        if resume:
            runner.resume(resume)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastrunner.hooks.optimizer_fp16.switch_half_on", lambda *args: None)
            runner.run([batches(4)], [("train", 1)])
        return [p.tolist() for p in runner.model.parameters()]

    whole = go("whole")
    assert go("again", f"whole/iter_{at}.pth") == whole


def test_a_stopped_run_goes_on_inside_its_window():
    def go(*stops):
        runner = make(EpochBasedRunner, GradientCumulativeOptimizerHook(3))
        runner.register_hook(ClosureHook("after_train_iter", lambda r: r.stop("now") if r.iter + 1 in stops else None))
        for _ in range(1 + len(stops)):
            runner.run([batches(4)], [("train", 1)])
        return [p.tolist() for p in runner.model.parameters()]

    assert go(2) == go(5) == go()


def test_between_windows_a_checkpoint_has_no_gradients():
    runner = make(IterBasedRunner, GradientCumulativeOptimizerHook(2))
    runner.register_hook(CheckpointHook(1, by_epoch=False))
    runner.run([batches(4)], [("train", 1)])
    grads = [
        torch.load(f"out/iter_{n}.pth")["resume"]["hooks"]["GradientCumulativeOptimizerHook"]["grads"]
        for n in range(1, 9)
    ]
    assert [sorted(each) for each in grads] == [["layer.bias", "layer.weight"], []] * 4


@pytest.mark.parametrize(
    ("max_iters", "n", "start", "factors"),
    [(8, 3, 0, [3] * 6 + [2] * 2), (10, 3, 0, [3] * 9 + [1]), (8, 3, 3, [3] * 3 + [2] * 2), (10, 3, 5, [3] * 4 + [1])],
)
def test_factors_as_mmcvs_tests_pin_them(max_iters, n, start, factors):
    runner = make(IterBasedRunner, None)
    hook = GradientCumulativeOptimizerHook(n)
    runner._max_iters, runner._iter = max_iters, start
    hook._init(runner)
    found = []
    for runner._iter in range(start, max_iters):
        found.append(hook._get_loss_factor(runner))
    assert found == factors


def test_warnings_about_lost_gradients_and_batch_norm(caplog):
    hook = GradientCumulativeOptimizerHook(3)
    assert hook.has_batch_norm(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)))
    assert not hook.has_batch_norm(nn.ReLU())
    model = TinyModel()
    model.norm = nn.BatchNorm1d(2)
    runner = make(IterBasedRunner, hook, model=model)
    runner._iter = 4  # as after resuming a file of mmcv
    with caplog.at_level(logging.WARNING):
        runner.run([batches(4)], [("train", 1)])
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2  # once each
    assert "iteration 4 is inside a window of 3" in said[0]
    assert "BatchNorm" in said[1]


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [("3", TypeError, "must be an int"), (True, TypeError, "must be an int"), (1.5, TypeError, "must be an int"),
     (0, ValueError, "must be > 0"), (-1, ValueError, "must be > 0")],
)  # fmt: skip
def test_bad_counts(value, error, says):
    with pytest.raises(error, match=f"cumulative_iters {says}"):
        GradientCumulativeOptimizerHook(value)


def test_no_optimizer_is_said_before_the_run_starts():
    runner = IterBasedRunner(TinyModel(), max_iters=2)
    runner.register_optimizer_hook(GradientCumulativeOptimizerHook(2))
    with pytest.raises(TypeError, match="drives one optimizer, the runner has NoneType"):
        runner.run([batches()], [("train", 1)])


def test_parameters_outside_the_graph_are_named():
    runner = make(IterBasedRunner, GradientCumulativeOptimizerHook(2, detect_anomalous_params=True), dict(max_iters=1))
    runner.model.aside = nn.Linear(1, 1, bias=False)
    said = []
    runner.logger = logging.Logger("mine")
    runner.logger.log = lambda level, msg: said.append(msg)
    runner.run([batches()], [("train", 1)])
    assert said == ["aside.weight with shape torch.Size([1, 1]) is not in the computational graph \n"]
