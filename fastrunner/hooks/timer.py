"""How long an iteration takes, and how much of it was waiting for data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class IterTimerHook(Hook):
    """Logs ``data_time`` (until the batch was there) and ``time`` (the whole iteration), in seconds of wall time.

    On a GPU the kernels of an iteration may still run when it is stamped: over many iterations ``time`` is right, a
    single one is not. Nothing here waits for the device. Between due points the runner reads the clock itself, where no
    other hook could tell.
    """

    def __init__(self) -> None:
        self.t = time.perf_counter()

    def before_epoch(self, runner: BaseRunner) -> None:
        self.t = time.perf_counter()

    def before_iter(self, runner: BaseRunner) -> None:
        runner.log_buffer.update({"data_time": time.perf_counter() - self.t})

    def after_iter(self, runner: BaseRunner) -> None:
        now = time.perf_counter()
        runner.log_buffer.update({"time": now - self.t})
        self.t = now
