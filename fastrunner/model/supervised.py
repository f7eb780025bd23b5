"""A plain ``nn.Module`` and a loss as the model that a runner wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .precision import auto_fp16


class Supervised(nn.Module):
    """``train_step``, ``val_step`` (MMCV's contract), ``test_step`` around a module and a loss."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], keys: tuple[str, str]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.keys = keys
        self.fp16_enabled = False  # Fp16OptimizerHook and Bf16OptimizerHook switch it on

    @auto_fp16(out_fp32=True)
    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)  # type: ignore[no-any-return]

    def train_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        inputs, target = self._split(data_batch)
        output = self(inputs)
        loss = self.loss_fn(output, target)
        log_vars = {"loss": loss.detach()}
        if output.dim() == 2 and not target.is_floating_point() and target.dim() == 1:  # class scores against classes
            log_vars["acc"] = (output.detach().argmax(1) == target).float().mean()
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(target)}

    @torch.no_grad()
    def val_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        return self.train_step(data_batch, optimizer, **kwargs)

    def test_step(self, data_batch: Any) -> Tensor:
        """The module's outputs, one row a sample."""
        return self(self._split(data_batch)[0])  # type: ignore[no-any-return]

    def _split(self, batch: Any) -> tuple[Tensor, Tensor]:
        device = next((p.device for p in self.parameters()), None)
        if isinstance(batch, Mapping) and all(key in batch for key in self.keys):
            inputs, target = (batch[key] for key in self.keys)
        elif isinstance(batch, Sequence) and len(batch) == 2:
            inputs, target = batch
        else:
            got = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise TypeError(
                f"supervised() reads batches that are pairs or dicts with {self.keys}, got {got}; "
                "name your own with supervised(model, loss_fn, keys=(inputs, target))"
            )
        if device is not None and inputs.device != device:
            inputs, target = inputs.to(device, non_blocking=True), target.to(device, non_blocking=True)
        return inputs, target


def supervised(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], *, keys: tuple[str, str] = ("img", "gt_label")
) -> Supervised:
    """Give a plain module what a runner needs.

    Args:
        model: maps inputs to outputs.
        loss_fn: ``loss_fn(output, target)`` -> scalar tensor, e.g. ``nn.CrossEntropyLoss()``.
        keys: where a dict batch has inputs and target; a batch may also be a pair.
    Returns:
        A module whose ``train_step`` returns dict(loss, log_vars, num_samples); the log has ``loss``, and ``acc`` where
        outputs are (N, classes) and targets are (N,) integers. Both stay tensors: nothing reads the device.
    """
    return Supervised(model, loss_fn, keys)
