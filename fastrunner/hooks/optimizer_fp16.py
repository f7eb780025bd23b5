"""Mixed precision: float16 with a scaled loss, bfloat16 without.

    scale(loss).backward(); g <- g / scale; update unless a gradient is inf or NaN; scale <- grown, halved or the same
Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740; ``torch.amp.GradScaler`` does it, on the device.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.precision import wrap_fp16_model
from ..registry import HOOKS
from .optimizer_cumulative import GradientCumulativeOptimizerHook, SteppingHook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class Fp16OptimizerHook(SteppingHook):
    """OptimizerHook with a scaled loss; switches ``auto_fp16`` and ``force_fp32`` of the model's modules on.

    Weights stay float32. An update with inf or NaN among the gradients is left out. Where the optimizer takes that as a
    tensor (torch's with ``fused=True``), nothing waits for the device; others read one number an update.

    Args:
        grad_clip, detect_anomalous_params: see :class:`OptimizerHook`; clipping sees gradients without the scale.
        loss_scale: a number: it stays; "dynamic": halved after inf or NaN, doubled after 2,000 updates without; a dict:
            arguments of ``torch.amp.GradScaler``.
        coalesce, bucket_size_mb, distributed: of older torch; they change nothing.
    Raises:
        ValueError: another ``loss_scale``.
    Attributes:
        loss_scaler: the ``torch.amp.GradScaler``; checkpoints have its state in ``meta["fp16"]["loss_scaler"]``.
    """

    def __init__(
        self,
        grad_clip: dict[str, Any] | None = None,
        coalesce: bool = True,
        bucket_size_mb: int = -1,
        loss_scale: float | str | dict[str, Any] = 512.0,
        distributed: bool = True,
        detect_anomalous_params: bool = False,
    ) -> None:
        super().__init__(grad_clip, detect_anomalous_params)
        self.coalesce = coalesce
        self.bucket_size_mb = bucket_size_mb
        self.distributed = distributed
        self.loss_scale = loss_scale
        self._scale_update_param: float | None = None  # the scale after each update, where it stays
        if loss_scale == "dynamic":
            self._scaler_args: dict[str, Any] = {}
        elif isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool) and loss_scale > 0:
            self._scale_update_param = float(loss_scale)
            self._scaler_args = {"init_scale": float(loss_scale)}
        elif isinstance(loss_scale, dict):
            self._scaler_args = dict(loss_scale)
        else:
            raise ValueError(f'loss_scale must be a number > 0, "dynamic" or a dict, got {loss_scale!r}')
        self._make_scaler("cuda" if torch.cuda.is_available() else "cpu")

    def _make_scaler(self, device: str) -> None:
        self._device = device
        self.loss_scaler = torch.amp.GradScaler(device, **self._scaler_args)

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        switch_half_on(runner, torch.float16, self)
        device = next((p.device.type for p in runner.model.parameters()), self._device)
        if device != self._device:
            state = self.loss_scaler.state_dict()
            self._make_scaler(device)
            self.loss_scaler.load_state_dict(state)
        if runner.meta is not None and "loss_scaler" in runner.meta.get("fp16", {}):
            saved = runner.meta["fp16"]["loss_scaler"]
            if saved:  # mmcv writes an empty one on the CPU
                self.loss_scaler.load_state_dict(saved)

    def after_train_iter(self, runner: BaseRunner) -> None:
        runner.model.zero_grad()
        runner.optimizer.zero_grad()
        self._backward(runner, self._loss(runner))
        self._update(runner)

    def _backward(self, runner: BaseRunner, loss: Tensor) -> None:
        self.loss_scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _update(self, runner: BaseRunner) -> None:
        self.loss_scaler.unscale_(runner.optimizer)
        self._clip(runner)
        self.loss_scaler.step(runner.optimizer)
        self.loss_scaler.update(self._scale_update_param)

    def write_meta(self, runner: BaseRunner) -> None:
        """Called before a checkpoint is written. Reads the device, which MMCV does after each iteration."""
        if runner.meta is None:
            runner.meta = {}
        runner.meta.setdefault("fp16", {})["loss_scaler"] = self.loss_scaler.state_dict()


@HOOKS.register_module()
class GradientCumulativeFp16OptimizerHook(GradientCumulativeOptimizerHook, Fp16OptimizerHook):
    """:class:`GradientCumulativeOptimizerHook` with :class:`Fp16OptimizerHook`'s scaled loss.

    Args:
        cumulative_iters, no_sync: as there.
        **kwargs: see :class:`Fp16OptimizerHook`.
    """


@HOOKS.register_module()
class Bf16OptimizerHook(SteppingHook):
    """OptimizerHook that switches ``auto_fp16`` of the model's modules on, with bfloat16 as the half type.

    bfloat16 has float32's range, so that no loss is scaled. Weights stay float32.

    Args:
        grad_clip, detect_anomalous_params: see :class:`OptimizerHook`.
    """

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        switch_half_on(runner, torch.bfloat16, self)


@HOOKS.register_module()
class GradientCumulativeBf16OptimizerHook(GradientCumulativeOptimizerHook, Bf16OptimizerHook):
    """:class:`GradientCumulativeOptimizerHook` with :class:`Bf16OptimizerHook`'s half type."""


def switch_half_on(runner: BaseRunner, dtype: torch.dtype, hook: object) -> None:
    """``wrap_fp16_model``, with a warning where no module listens.

    Raises:
        ValueError: the step has a precision of its own.
    """
    model, amp = runner.model, runner.step_config.amp
    if amp is not None:
        raise ValueError(
            f"{type(hook).__name__} and step=dict(amp={amp!r}) both set the precision: keep one. The hook scales "
            "the loss and asks the model's modules; amp puts the whole of train_step under autocast"
        )
    wrap_fp16_model(model, dtype)
    if not any(hasattr(module, "fp16_enabled") for module in model.modules()):
        warnings.warn(
            f"{type(hook).__name__}: no module of {type(model).__name__} has the attribute fp16_enabled, so that all "
            "runs in float32; decorate forward with auto_fp16 and set self.fp16_enabled = False in __init__",
            stacklevel=3,
        )
