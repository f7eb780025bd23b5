"""Fp16OptimizerHook and its bfloat16 sister: scales, skipped updates, state, what runs in half precision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn

from fastrunner import (
    Bf16OptimizerHook,
    CheckpointHook,
    ClosureHook,
    Fp16OptimizerHook,
    FusedSGD,
    GradientCumulativeBf16OptimizerHook,
    GradientCumulativeFp16OptimizerHook,
    IterBasedRunner,
    supervised,
)

GROW = dict(init_scale=1024.0, growth_interval=2)


class Half(TinyModel):
    """Says in which types it ran."""

    def __init__(self):
        super().__init__()
        inner = nn.Linear(2, 1)
        self.inner = supervised(inner, lambda output, target: output.square().mean())
        self.layer = inner
        self.seen = []
        inner.register_forward_hook(lambda module, args, output: self.seen.append(output.dtype))

    def train_step(self, data_batch, optimizer=None, **kwargs):
        loss = self.inner(data_batch).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(data_batch))


def make(hook, iters=6, work_dir="out", optimizer=FusedSGD, poison=(), device="cpu"):
    torch.manual_seed(0)
    model = Half().to(device)
    runner = IterBasedRunner(model, optimizer=optimizer(model.parameters(), lr=0.1), work_dir=work_dir, max_iters=iters)
    runner.register_optimizer_hook(hook)

    def spoil(runner):
        if runner.iter in poison:
            runner.outputs["loss"] = runner.outputs["loss"] * float("inf")

    runner.register_hook(ClosureHook("after_train_iter", spoil), "HIGH")
    return runner


def run(hook, **options):
    """The scale and the weights after each iteration."""
    runner = make(hook, **options)
    device = options.get("device", "cpu")
    scales, weights = [], []

    def look(runner):
        scaler = getattr(hook, "loss_scaler", None)
        scales.append(scaler.get_scale() if scaler else None)
        weights.append([p.detach().tolist() for p in runner.model.parameters()])

    runner.register_hook(ClosureHook("after_train_iter", look), "LOW")
    runner.run([[batch.to(device) for batch in batches(3)]], [("train", 1)])
    return runner, scales, weights


def changed(weights):
    return [True, *(a != b for a, b in pairwise(weights))]


@pytest.mark.parametrize("scale", [512.0, 512, "dynamic", dict(init_scale=8.0)])
def test_the_model_runs_in_float16_and_the_weights_stay_float32(scale):
    runner, scales, weights = run(Fp16OptimizerHook(loss_scale=scale))
    assert set(runner.model.seen) == {torch.float16}
    assert {p.dtype for p in runner.model.parameters()} == {torch.float32}
    if scale == "dynamic":  # 65,536 is beyond float16's largest number: the first updates are left out
        assert scales[0] == 32768.0
        assert changed(weights)[-1]
    else:
        assert set(scales) == {8.0 if isinstance(scale, dict) else 512.0}
        assert all(changed(weights))


@pytest.mark.parametrize("optimizer", [FusedSGD, torch.optim.SGD])
def test_an_update_with_inf_is_left_out_and_the_scale_follows(optimizer):
    hook = Fp16OptimizerHook(loss_scale=GROW, grad_clip=dict(max_norm=10.0))
    _, scales, weights = run(hook, poison=[1], optimizer=optimizer)
    assert scales == [1024, 512, 512, 1024, 1024, 2048]
    assert changed(weights) == [True, False, True, True, True, True]
    _, scales, weights = run(Fp16OptimizerHook(loss_scale=64.0), poison=[1], optimizer=optimizer)
    assert scales == [64.0] * 6  # a number stays
    assert changed(weights) == [True, False, True, True, True, True]


def test_clipping_sees_gradients_without_the_scale():
    norms = []
    for scale in (1.0, 256.0):
        runner, *_ = run(Fp16OptimizerHook(loss_scale=scale, grad_clip=dict(max_norm=0.01)))
        norms.append(runner.log_buffer.val_history["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)  # float16 activations: 11 bits
    assert max(norms[0]) > 0.01


@pytest.mark.parametrize("make_hook", [Fp16OptimizerHook, lambda **k: GradientCumulativeFp16OptimizerHook(2, **k)])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_the_scalers_state_survives_a_resume(make_hook, at):
    def go(work_dir, resume=None):
        hook = make_hook(loss_scale=GROW)
        runner = make(hook, work_dir=work_dir, poison=[2])
        runner.register_hook(CheckpointHook(1, by_epoch=False))
        if resume:
            runner.resume(resume)
        runner.run([batches(3)], [("train", 1)])
        return [p.tolist() for p in runner.model.parameters()], hook.loss_scaler.state_dict()

    whole = go("whole")
    saved = torch.load(f"whole/iter_{at}.pth")["meta"]["fp16"]["loss_scaler"]
    assert saved.keys() == {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    assert go("again", f"whole/iter_{at}.pth") == whole


def test_an_empty_state_of_mmcv_on_the_cpu_is_no_state():
    hook = Fp16OptimizerHook(loss_scale=64.0)
    runner = make(hook)
    runner.meta = dict(fp16=dict(loss_scaler={}))
    runner.run([batches(3)], [("train", 1)])
    assert hook.loss_scaler.get_scale() == 64.0


@pytest.mark.parametrize("make_hook", [Bf16OptimizerHook, lambda: GradientCumulativeBf16OptimizerHook(2)])
def test_bfloat16(make_hook):
    runner, _, weights = run(make_hook())
    assert set(runner.model.seen) == {torch.bfloat16}
    assert {p.dtype for p in runner.model.parameters()} == {torch.float32}
    accumulates = isinstance(runner.hooks[1], GradientCumulativeBf16OptimizerHook)
    assert changed(weights)[1:] == ([True, False, True, False, True] if accumulates else [True] * 5)


def test_a_model_that_does_not_listen_is_warned_about():
    model = TinyModel()
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=2)
    runner.register_optimizer_hook(dict(type="Fp16OptimizerHook"))
    with pytest.warns(UserWarning, match="no module of TinyModel has the attribute fp16_enabled"):
        runner.run([batches()], [("train", 1)])


@pytest.mark.parametrize("scale", ["static", None, True, -1.0, 0])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match="loss_scale must be"):
        Fp16OptimizerHook(loss_scale=scale)


@pytest.mark.parametrize("hook", [Fp16OptimizerHook, Bf16OptimizerHook])
def test_two_things_that_set_the_precision_are_one_too_many(hook):
    model = TinyModel()
    optimizer, step = FusedSGD(model.parameters(), lr=0.1), dict(amp="fp16")
    runner = IterBasedRunner(model, optimizer=optimizer, work_dir="out", max_iters=2, step=step)
    runner.register_optimizer_hook(hook())
    with pytest.raises(ValueError, match=rf"{hook.__name__} and step=dict\(amp='fp16'\) both set the precision"):
        runner.run([batches(2)], [("train", 1)])


@pytest.mark.cuda
def test_nothing_waits_for_the_device_with_an_optimizer_that_takes_found_inf():
    def fused(params, lr):
        return torch.optim.SGD(params, lr=lr, fused=True)

    hook = Fp16OptimizerHook(loss_scale=GROW, grad_clip=dict(max_norm=10.0))
    runner = make(hook, optimizer=fused, device="cuda")
    data = [batch.cuda() for batch in batches(3)]
    runner.register_hook(ClosureHook("before_train_epoch", lambda r: None))
    runner.register_hook(ClosureHook("before_train_iter", lambda r: torch.cuda.set_sync_debug_mode("error")))
    runner.register_hook(ClosureHook("after_train_iter", lambda r: torch.cuda.set_sync_debug_mode("default")), "LOWEST")
    try:
        runner.run([data], [("train", 1)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_an_update_with_inf_is_left_out_on_a_gpu():
    _, scales, weights = run(Fp16OptimizerHook(loss_scale=GROW), poison=[1], optimizer=torch.optim.SGD, device="cuda")
    assert scales == [1024, 512, 512, 1024, 1024, 2048]
    assert changed(weights) == [True, False, True, True, True, True]
