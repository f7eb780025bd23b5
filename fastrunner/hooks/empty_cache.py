"""Unused GPU memory, given back to the driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..registry import HOOKS
from .hook import NEVER, Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class EmptyCacheHook(Hook):
    """Calls ``torch.cuda.empty_cache()`` at the stages that are switched on, of training and of validation.

    For models whose image sizes vary so much that the cache fragments. After each iteration it costs milliseconds.
    """

    def __init__(self, before_epoch: bool = False, after_epoch: bool = True, after_iter: bool = False) -> None:
        self._before_epoch = before_epoch
        self._after_epoch = after_epoch
        self._after_iter = after_iter

    def before_epoch(self, runner: BaseRunner) -> None:
        if self._before_epoch:
            torch.cuda.empty_cache()

    def after_epoch(self, runner: BaseRunner) -> None:
        if self._after_epoch:
            torch.cuda.empty_cache()

    def after_iter(self, runner: BaseRunner) -> None:
        if self._after_iter:
            torch.cuda.empty_cache()

    def due(self, runner: BaseRunner) -> int:
        return runner.iter if self._after_iter else NEVER
