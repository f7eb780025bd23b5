"""Recipe ``eager``: the model's own ``train_step``, with the precision and layout that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .config import AMP


class Stepping:
    """Stands for the model where an iteration calls ``model.train_step``.

    Args:
        model: the runner's.
        amp: "bf16" or "fp16": autocast around ``train_step``; None: none.
        channels_last: hand 4-D tensors of the batch on in that layout. (The weights were moved once.)
        call: instead of the model's ``train_step``.
    """

    def __init__(self, model: Any, amp: str | None, channels_last: bool, call: Callable[..., Any] | None) -> None:
        self.model, self.amp, self.channels_last = model, amp, channels_last
        self.call: Callable[..., Any] = model.train_step if call is None else call

    def train_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> Any:
        if self.channels_last:
            data_batch = pytree.tree_map(_channels_last, data_batch)
        if self.amp is None:
            return self.call(data_batch, optimizer, **kwargs)
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        with torch.autocast(device, dtype=AMP[self.amp]):
            return self.call(data_batch, optimizer, **kwargs)


def stepping(model: Any, amp: str | None, channels_last: bool, call: Callable[..., Any] | None = None) -> Any:
    """The model itself where nothing is to be added to its ``train_step``."""
    plain = amp is None and not channels_last and call is None
    return model if plain else Stepping(model, amp, channels_last, call)


def move_channels_last(model: nn.Module) -> None:
    """Let 4-D parameters and buffers of the model lie channels last. Values and identities stay."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def _channels_last(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.dim() == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf
