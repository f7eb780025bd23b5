"""Buffers that differ between ranks, made the same again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dist import allreduce_params
from ..registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class SyncBuffersHook(Hook):
    """Averages the model's floating-point buffers (BatchNorm's statistics) over the ranks at each epoch's end.

    Counters such as ``num_batches_tracked`` are left alone. In the iteration runner it acts once, after the loop.

    Args:
        distributed: False: does nothing.
    """

    def __init__(self, distributed: bool = True) -> None:
        self.distributed = distributed

    def after_epoch(self, runner: BaseRunner) -> None:
        if self.distributed:
            allreduce_params(runner.model.buffers())
