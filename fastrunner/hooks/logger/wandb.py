"""Scalars, texts and the run's files for Weights & Biases."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from ...registry import HOOKS
from ..folders import files_ending
from .base import LoggerHook
from .packages import require

if TYPE_CHECKING:
    from ...runner.base import BaseRunner

SUMMARIES = ("min", "max", "mean", "best", "last", "none")


@HOOKS.register_module()
class WandbLoggerHook(LoggerHook):
    """Logs averages, lr and momentum with ``wandb.log``, on rank 0.

    Args:
        init_kwargs: arguments of ``wandb.init``.
        interval, ignore_last, reset_flag, by_epoch: see :class:`LoggerHook`.
        commit: see ``wandb.log``.
        with_step: give ``iter + 1`` as wandb's step; otherwise log it as ``global_step``.
        log_artifact: at the end of the run, add the files of the work_dir to an artifact.
        out_suffix: which of them, by their ends.
        define_metric_cfg: metric -> summary, for ``wandb.define_metric``.
    Raises:
        ImportError: the package wandb is not installed; said when the hook is made.
    """

    def __init__(
        self,
        init_kwargs: dict[str, Any] | None = None,
        interval: int = 10,
        ignore_last: bool = True,
        reset_flag: bool = False,
        commit: bool = True,
        by_epoch: bool = True,
        with_step: bool = True,
        log_artifact: bool = True,
        out_suffix: str | tuple[str, ...] = (".log.json", ".log", ".py"),
        define_metric_cfg: dict[str, str] | None = None,
    ) -> None:
        self.import_wandb()
        super().__init__(interval, ignore_last, reset_flag, by_epoch)
        self.init_kwargs = init_kwargs
        self.commit = commit
        self.with_step = with_step
        self.log_artifact = log_artifact
        self.out_suffix = out_suffix
        self.define_metric_cfg = define_metric_cfg

    def import_wandb(self) -> None:
        require("wandb", type(self).__name__)
        self.wandb: Any = importlib.import_module("wandb")

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        if runner.rank != 0:
            return
        self.wandb.init(**(self.init_kwargs or {}))
        for metric, summary in (self.define_metric_cfg or {}).items():
            if summary not in SUMMARIES:
                warnings.warn(f"define_metric: summary {summary!r} of {metric} is none of {SUMMARIES}", stacklevel=2)
            self.wandb.define_metric(metric, summary=summary)

    def log(self, runner: BaseRunner) -> None:
        if runner.rank != 0:
            return
        tags = self.get_loggable_tags(runner)
        if not tags:
            return
        if self.with_step:
            self.wandb.log(tags, step=self.get_iter(runner), commit=self.commit)
        else:
            self.wandb.log({**tags, "global_step": self.get_iter(runner)}, commit=self.commit)

    def after_run(self, runner: BaseRunner) -> None:
        if runner.rank != 0:
            return
        if self.log_artifact:
            artifact = self.wandb.Artifact(name="artifacts", type="model")
            for path in files_ending(runner.work_dir, self.out_suffix):
                artifact.add_file(path)
            self.wandb.log_artifact(artifact)
        self.wandb.finish()
