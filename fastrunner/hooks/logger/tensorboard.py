"""Scalars and texts for TensorBoard."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...registry import HOOKS
from .base import LoggerHook
from .packages import require

if TYPE_CHECKING:
    from ...runner.base import BaseRunner


@HOOKS.register_module()
class TensorboardLoggerHook(LoggerHook):
    """Writes averages, lr and momentum with ``torch.utils.tensorboard``, on rank 0, at step ``iter + 1``.

    Args:
        log_dir: None: ``<work_dir>/tf_logs``.
        interval, ignore_last, reset_flag, by_epoch: see :class:`LoggerHook`.
    Raises:
        ImportError: the package tensorboard is not installed; said when the hook is made.
    """

    def __init__(
        self,
        log_dir: str | None = None,
        interval: int = 10,
        ignore_last: bool = True,
        reset_flag: bool = False,
        by_epoch: bool = True,
    ) -> None:
        require("tensorboard", "TensorboardLoggerHook")
        super().__init__(interval, ignore_last, reset_flag, by_epoch)
        self.log_dir = self._given_log_dir = log_dir
        self.writer: Any = None

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        if runner.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # imports tensorboard: half a second

            self.log_dir = self._given_log_dir or os.path.join(runner.work_dir, "tf_logs")
            self.writer = SummaryWriter(self.log_dir)

    def log(self, runner: BaseRunner) -> None:
        if self.writer is None:  # another rank
            return
        for tag, value in self.get_loggable_tags(runner, allow_text=True).items():
            if isinstance(value, str):
                self.writer.add_text(tag, value, self.get_iter(runner))
            else:
                self.writer.add_scalar(tag, value, self.get_iter(runner))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
