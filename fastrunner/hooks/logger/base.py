"""When a logger logs, and under which names. Subclasses say where to."""

from __future__ import annotations

import numbers
from abc import ABCMeta, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..hook import NEVER, Hook

if TYPE_CHECKING:
    from ...runner.base import BaseRunner


class LoggerHook(Hook, metaclass=ABCMeta):
    """Base of the loggers; subclasses define ``log(runner)``.

    Args:
        interval: log every so many iterations.
        ignore_last: do not log a last, incomplete interval of an epoch.
        reset_flag: clear the averages after logging; ``before_run`` sets it on the last logger.
        by_epoch: count the iterations within the epoch.
    """

    def __init__(
        self, interval: int = 10, ignore_last: bool = True, reset_flag: bool = False, by_epoch: bool = True
    ) -> None:
        self.interval = interval
        self.ignore_last = ignore_last
        self.reset_flag = reset_flag
        self.by_epoch = by_epoch

    _averaged_at = -1  # iteration; EvalHook asks loggers to log training's values before it evaluates

    @abstractmethod
    def log(self, runner: BaseRunner) -> Any:
        """Write what ``runner.log_buffer.output`` holds."""

    @staticmethod
    def is_scalar(val: Any, include_np: bool = True, include_torch: bool = True) -> bool:
        """Whether ``val`` is one number: a Python number, a 0-d array, or a tensor of one element."""
        if isinstance(val, numbers.Number):
            return True
        if include_np and isinstance(val, np.ndarray):
            return val.ndim == 0
        return include_torch and isinstance(val, torch.Tensor) and val.numel() == 1

    def get_mode(self, runner: BaseRunner) -> str:
        """ "train" or "val". Evaluation results logged during training are "val": they come without ``time``."""
        if runner.mode == "train":
            return "train" if "time" in runner.log_buffer.output else "val"
        if runner.mode == "val":
            return "val"
        raise ValueError(f"runner mode must be 'train' or 'val' to log, got {runner.mode!r}")

    def get_epoch(self, runner: BaseRunner) -> int:
        if runner.mode == "train":
            return runner.epoch + 1
        if runner.mode == "val":
            return runner.epoch  # the epoch that was just trained is counted already
        raise ValueError(f"runner mode must be 'train' or 'val' to log, got {runner.mode!r}")

    def get_iter(self, runner: BaseRunner, inner_iter: bool = False) -> int:
        return runner.inner_iter + 1 if self.by_epoch and inner_iter else runner.iter + 1

    def get_lr_tags(self, runner: BaseRunner) -> dict[str, float]:
        return _tags("learning_rate", runner.current_lr())

    def get_momentum_tags(self, runner: BaseRunner) -> dict[str, float]:
        return _tags("momentum", runner.current_momentum())

    def get_loggable_tags(
        self,
        runner: BaseRunner,
        allow_scalar: bool = True,
        allow_text: bool = False,
        add_mode: bool = True,
        tags_to_skip: tuple[str, ...] = ("time", "data_time"),
    ) -> dict[str, Any]:
        """What a scalar writer gets: the averages, prefixed with the mode, then lr and momentum of the first group."""
        tags = {}
        for name, value in runner.log_buffer.output.items():
            if name in tags_to_skip:
                continue
            if (self.is_scalar(value) and not allow_scalar) or (isinstance(value, str) and not allow_text):
                continue
            tags[f"{self.get_mode(runner)}/{name}" if add_mode else name] = value
        return {**tags, **self.get_lr_tags(runner), **self.get_momentum_tags(runner)}

    def before_run(self, runner: BaseRunner) -> None:
        self._averaged_at = -1
        for hook in reversed(runner.hooks):
            if isinstance(hook, LoggerHook):
                hook.reset_flag = True  # the last to log clears what all have logged
                break

    def before_epoch(self, runner: BaseRunner) -> None:
        runner.log_buffer.clear()  # histories of an epoch, not of the run

    def after_train_iter(self, runner: BaseRunner) -> None:
        due = (
            self.every_n_inner_iters(runner, self.interval)
            if self.by_epoch
            else self.every_n_iters(runner, self.interval)
        )
        due = due or (not self.ignore_last and self.end_of_epoch(runner))
        if due and runner.iter != self._averaged_at:  # or what is ready now is an evaluation's, not training's
            self._averaged_at = runner.iter
            runner.log_buffer.average(self.interval)
            ready = getattr(runner.data_loader, "num_ready", None)
            if ready is not None:  # batches that lie ready now: 0 says that the loader is what is waited for
                runner.log_buffer.output["data_ready"] = ready
        self._log_if_ready(runner)

    due_if_alone = True  # whoever sets log_buffer.ready makes all loggers log

    def due(self, runner: BaseRunner) -> int:
        if self.ignore_last and not self.by_epoch:
            return runner.iter + -(runner.iter + 1) % self.interval if self.interval > 0 else NEVER
        if runner.max_epochs is None:
            return runner.iter  # the iteration runner counts inner_iter within workflow entries
        left = len(runner.data_loader) - runner.inner_iter  # batches of this epoch, with the one at hand
        if left <= 0:
            return runner.iter  # more batches than the loader's length said
        count = runner.inner_iter if self.by_epoch else runner.iter
        step = -(count + 1) % self.interval if self.interval > 0 else left
        return runner.iter + min(step, left if self.ignore_last else left - 1)

    def after_train_epoch(self, runner: BaseRunner) -> None:
        self._log_if_ready(runner)  # what an evaluation at the end of the epoch has put there

    def after_val_epoch(self, runner: BaseRunner) -> None:
        runner.log_buffer.average()
        self._log_if_ready(runner)

    def _log_if_ready(self, runner: BaseRunner) -> None:
        # ``ready`` is shared: once one logger has averaged, the loggers behind it log too.
        if runner.log_buffer.ready:
            self.log(runner)
            if self.reset_flag:
                runner.log_buffer.clear_output()


def _tags(name: str, values: list[float] | dict[str, list[float]]) -> dict[str, float]:
    if isinstance(values, dict):
        return {f"{name}/{key}": value[0] for key, value in values.items()}
    return {name: values[0]}
