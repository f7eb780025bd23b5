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
    torch.testing.assert_close(runner.model.layer.weight.double(), average, rtol=1e-6, atol=1e-7)
    assert torch.equal(runner.model.ema_layer_weight.double(), weights[-1])


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


def reload(path):
    state = torch.load(path)["state_dict"]
    return state["layer.weight"], state["ema_layer_weight"]


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
def test_files_and_val_iterations_see_the_averages_and_training_the_raw_weights(kind):
    length = dict(max_epochs=3) if kind is EpochBasedRunner else dict(max_iters=9)
    runner = make(kind, EMAHook(momentum=0.1), priority=45, **length)
    runner.register_checkpoint_hook(dict(interval=2, by_epoch=False))
    inside, at_val = {}, {}
    runner.register_hook(ClosureHook("after_train_iter", lambda r: inside.update({r.iter + 1: _pair(r)})), "LOW")
    runner.register_hook(ClosureHook("before_val_iter", lambda r: at_val.update({r.iter: _pair(r)})), "LOW")
    runner.run([batches(), batches(1)], [("train", 3 if kind is IterBasedRunner else 1), ("val", 1)])
    assert sorted(inside) == list(range(1, 10))
    assert sorted(at_val) == [3, 6, 9]
    for iteration, (params, buffers) in at_val.items():
        raw, average = inside[iteration]
        assert torch.equal(params, average)
        assert torch.equal(buffers, raw)
    for iteration in (2, 4, 6, 8):
        params, buffers = reload(f"out/iter_{iteration}.pth")
        raw, average = inside[iteration]
        assert torch.equal(params, average)
        assert torch.equal(buffers, raw)
    # the same training without EMA, saves and val: nobody has touched the raw weights
    torch.manual_seed(0)
    plain = kind(TinyModel(), optimizer=None, work_dir="plain", **length)
    plain.optimizer = FusedSGD(plain.model.parameters(), lr=0.1)
    plain.register_optimizer_hook({})
    plain.run([batches()], [("train", 1)])
    assert torch.equal(plain.model.layer.weight, inside[9][0])


@pytest.mark.parametrize("priority", [45, "NORMAL"])  # before CheckpointHook, and after it
@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
@pytest.mark.parametrize("resume_at", [2, 3, 7])
def test_a_resume_anywhere_equals_a_run_that_was_not_interrupted(kind, priority, resume_at):
    def go(work_dir, resume=None):
        length = dict(max_epochs=3) if kind is EpochBasedRunner else dict(max_iters=9)
        runner = kind(TinyModel(), work_dir=work_dir, **length)
        runner.optimizer = FusedSGD(runner.model.parameters(), lr=0.1, momentum=0.9)
        runner.register_training_hooks(dict(policy="fixed"), {}, dict(interval=1, by_epoch=False))
        runner.register_hook(EMAHook(momentum=0.1, warm_up=2), priority)
        if resume:
            runner.resume(resume)
        runner.run([batches(), batches(1)], [("train", 1), ("val", 1)])
        return _pair(runner)

    torch.manual_seed(0)
    whole = go("whole")
    again = go("again", f"whole/iter_{resume_at}.pth")
    assert torch.equal(again[0], whole[0])
    assert torch.equal(again[1], whole[1])


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_a_stopped_run_goes_on_with_its_averages(kind, stop_after):
    def go(*stops):
        length = dict(max_epochs=3) if kind is EpochBasedRunner else dict(max_iters=9)
        runner = make(kind, EMAHook(momentum=0.1, warm_up=2), **length)
        runner.register_hook(ClosureHook("after_train_iter", lambda r: r.stop("now") if r.iter + 1 in stops else None))
        for _ in range(1 + len(stops)):
            runner.run([batches()], [("train", 1)])
        return _pair(runner)

    whole, stopped = go(), go(stop_after)
    assert torch.equal(stopped[0], whole[0])
    assert torch.equal(stopped[1], whole[1])


def test_a_checkpoint_of_mmcvs_iteration_runner_is_not_swapped():
    runner = make(IterBasedRunner, EMAHook(momentum=0.1), max_iters=3)
    runner.run([batches()], [("train", 1)])
    runner.save_checkpoint("mmcv")
    content = torch.load("mmcv/latest.pth")
    del content["resume"]
    weights = content["state_dict"]
    for name in ("weight", "bias"):  # mmcv never swaps there
        average, raw = weights[f"layer.{name}"], weights[f"ema_layer_{name}"]
        weights[f"layer.{name}"], weights[f"ema_layer_{name}"] = raw, average
    torch.save(content, "mmcv/mmcv.pth")
    second = make(IterBasedRunner, EMAHook(momentum=0.1), max_iters=4)
    seen = []
    second.register_hook(ClosureHook("before_train_iter", lambda r: seen.append(_pair(r))))
    second.resume("mmcv/mmcv.pth")
    second._iter = 3
    second.run([batches()], [("train", 1)])
    assert torch.equal(seen[0][0], weights["layer.weight"])
    assert torch.equal(seen[0][1], weights["ema_layer_weight"])


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


def test_resume_from_is_a_resume_once_the_buffers_exist():
    first = make(EpochBasedRunner, EMAHook(momentum=0.5, warm_up=0), max_epochs=1)
    first.register_checkpoint_hook(dict(interval=1))
    first.run([batches()], [("train", 1)])
    average, raw = _pair(first)
    second = make(EpochBasedRunner, EMAHook(momentum=0.5, warm_up=0, resume_from="out/epoch_1.pth"), max_epochs=2)
    seen = []
    second.register_hook(ClosureHook("before_train_iter", lambda r: seen.append((_pair(r), r.iter))))
    second.run([batches()], [("train", 1)])
    (params, buffers), iteration = seen[0]
    assert torch.equal(params, raw)
    assert torch.equal(buffers, average)
    assert iteration == 3
