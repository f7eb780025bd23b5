"""EMAHook in the situations that the goldens from mmcv do not have."""

from __future__ import annotations

import pytest
import torch
from runner.helpers import TinyModel, batches

from fastrunner import ClosureHook, EMAHook, EpochBasedRunner, FusedSGD, IterBasedRunner


def make(kind, hook, priority="NORMAL", **length):
    torch.manual_seed(0)
    model = TinyModel()
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1), work_dir="out", **length)
    runner.register_optimizer_hook({})
    runner.register_hook(hook, priority=priority)
    return runner


def test_the_average_is_the_formula_in_float64():
    runner = make(IterBasedRunner, EMAHook(momentum=0.1, warm_up=2), max_iters=7)
    weights = []
    runner.register_hook(
        ClosureHook("after_iter", lambda r: weights.append(r.model.layer.weight.detach().double())), 45
    )
    start = runner.model.layer.weight.detach().double()
    runner.run([batches()], [("train", 1)])
    average = start
    for i, weight in enumerate(weights):
        m = min(0.1, (1 + i) / (2 + i))
        average = average * (1 - m) + m * weight
    # float32 against float64: one rounding an iteration
    torch.testing.assert_close(runner.model.ema_layer_weight.double(), average, rtol=1e-6, atol=1e-7)


def test_between_epochs_the_model_holds_the_averages_and_in_an_epoch_the_raw_weights():
    runner = make(EpochBasedRunner, EMAHook(momentum=0.1), max_epochs=3)
    inside, between = [], []
    runner.register_hook(ClosureHook("after_train_iter", lambda r: inside.append(_pair(r))), "LOW")
    runner.register_hook(ClosureHook("before_val_epoch", lambda r: between.append(_pair(r))), "LOW")
    runner.run([batches(), batches()], [("train", 1), ("val", 1)])
    for epoch, (params, buffers) in enumerate(between):
        raw, average = inside[3 * epoch + 2]
        assert torch.equal(params, average)
        assert torch.equal(buffers, raw)


def _pair(runner):
    return runner.model.layer.weight.detach().clone(), runner.model.ema_layer_weight.clone()


def test_a_checkpoint_of_mmcv_restores_the_raw_weights_at_the_first_epoch():
    """Such a file has no hook state; it is written after the swap: averages under the normal names."""
    runner = make(EpochBasedRunner, EMAHook(momentum=0.1), max_epochs=1)
    runner.run([batches()], [("train", 1)])
    runner.save_checkpoint("mmcv")
    content = torch.load("mmcv/latest.pth")
    del content["resume"]
    content["meta"].update(epoch=1, iter=3, mmcv_version="1.7.2")
    torch.save(content, "mmcv/epoch_1.pth")
    average, raw = _pair(runner)

    second = make(EpochBasedRunner, EMAHook(momentum=0.1), max_epochs=2)
    first_seen = []
    second.register_hook(ClosureHook("before_train_iter", lambda r: first_seen.append(_pair(r))))
    second.resume("mmcv/epoch_1.pth")
    second.run([batches()], [("train", 1)])
    assert torch.equal(first_seen[0][0], raw)
    assert torch.equal(first_seen[0][1], average)


def test_warm_up_zero_does_not_divide_by_zero():
    runner = make(IterBasedRunner, EMAHook(momentum=0.5, warm_up=0), max_iters=2)
    runner.run([batches()], [("train", 1)])
    assert torch.isfinite(runner.model.ema_layer_weight).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(interval=0), "interval must be an int > 0"),
        (dict(interval=1.5), "interval must be an int > 0"),
        (dict(momentum=0), r"momentum must be in \(0, 1\)"),
        (dict(momentum=1), r"momentum must be in \(0, 1\)"),
        (dict(momentum=float("nan")), r"momentum must be in \(0, 1\)"),
        (dict(warm_up=-1), "warm_up must be >= 0"),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises(ValueError, match=says):
        EMAHook(**arguments)
