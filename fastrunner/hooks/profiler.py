"""``torch.profiler`` around the first epochs or iterations of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from ..registry import HOOKS
from .hook import NEVER, Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

ACTIVITIES = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}


@HOOKS.register_module()
class ProfilerHook(Hook):
    """Profiles on rank 0, from the start of the run.

    Args:
        by_epoch: count epochs; otherwise iterations.
        profile_iters: how many of them to profile, counted from where this run starts.
        activities: a list of "cpu" and "cuda"; "cuda" is left out where there is no GPU.
        schedule: arguments of ``torch.profiler.schedule``.
        on_trace_ready: a callable that gets the profiler; ``dict(type="log_trace", ...)`` prints
            ``key_averages().table(...)``; ``dict(type="tb_trace", dir_name=..., ...)`` writes for TensorBoard, into
            ``<work_dir>/tf_tracing_logs`` by default (a relative folder is one in the work_dir).
        record_shapes, profile_memory, with_stack, with_flops: see ``torch.profiler.profile``.
        json_trace_path: write a Chrome trace there at the end.
    Raises:
        TypeError, ValueError: bad arguments; before the run: more to profile than the run is long.
    Cost: while it profiles, every operation of the model is recorded; afterwards it is not called any more.
    """

    def __init__(
        self,
        by_epoch: bool = True,
        profile_iters: int = 1,
        activities: list[str] | None = None,
        schedule: dict[str, Any] | None = None,
        on_trace_ready: Callable[[Any], Any] | dict[str, Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        json_trace_path: str | None = None,
    ) -> None:
        if not isinstance(by_epoch, bool):
            raise TypeError(f"by_epoch must be a bool, got {by_epoch!r}")
        if not isinstance(profile_iters, int) or profile_iters < 1:
            raise ValueError(f"profile_iters must be an int >= 1, got {profile_iters!r}")
        _check_handler(on_trace_ready)
        self.by_epoch = by_epoch
        self.profile_iters = profile_iters
        self.activities = _activities(["cpu", "cuda"] if activities is None else activities)
        self.schedule = _schedule(schedule)
        self.on_trace_ready = on_trace_ready
        self.json_trace_path = json_trace_path
        self._options: dict[str, Any] = dict(
            record_shapes=record_shapes, profile_memory=profile_memory, with_stack=with_stack, with_flops=with_flops
        )
        self.profiler: Any = None  # while it profiles
        self._last = 0  # the epoch or iteration that ends it

    def before_run(self, runner: BaseRunner) -> None:
        limit, unit = (runner.max_epochs, "max_epochs") if self.by_epoch else (runner.max_iters, "max_iters")
        if limit is None:
            raise ValueError(f"ProfilerHook(by_epoch={self.by_epoch}) counts in {unit}, which this runner has not")
        if self.profile_iters > limit:
            raise ValueError(f"profile_iters={self.profile_iters} is more than the run is long: {unit}={limit}")
        if runner.rank != 0:
            return
        if self.by_epoch and limit > 1:
            warnings.warn("profiling whole epochs takes much memory and time; by_epoch=False profiles iterations",
                          stacklevel=2)  # fmt: skip
        self._last = (runner.epoch if self.by_epoch else runner.iter) + self.profile_iters - 1
        self.profiler = profile(
            activities=self.activities,
            schedule=self.schedule,
            on_trace_ready=_handler(self.on_trace_ready, runner.work_dir),
            **self._options,
        )
        self.profiler.__enter__()

    def after_train_iter(self, runner: BaseRunner) -> None:
        if self.profiler is None:
            return
        self.profiler.step()
        if not self.by_epoch and runner.iter >= self._last:
            self._finish(runner)

    def after_train_epoch(self, runner: BaseRunner) -> None:
        if self.profiler is not None and self.by_epoch and runner.epoch >= self._last:
            self._finish(runner)

    def after_run(self, runner: BaseRunner) -> None:
        if self.profiler is not None:  # the run was stopped before
            self._finish(runner)

    def due(self, runner: BaseRunner) -> int:
        return NEVER if self.profiler is None else runner.iter

    def _finish(self, runner: BaseRunner) -> None:
        profiler, self.profiler = self.profiler, None
        runner.logger.info("profiler may take a few minutes...")
        profiler.__exit__(None, None, None)
        if self.json_trace_path is not None:
            profiler.export_chrome_trace(self.json_trace_path)

    def close(self) -> None:
        """After an error: stop profiling, write nothing."""
        if self.profiler is not None:
            profiler, self.profiler = self.profiler, None
            profiler.on_trace_ready = None
            profiler.__exit__(None, None, None)


def _activities(names: Any) -> list[ProfilerActivity]:
    if not isinstance(names, list):
        raise ValueError(f'activities must be a list of "cpu" and "cuda", got {type(names).__name__}')
    for name in names:
        if not isinstance(name, str) or name.lower() not in ACTIVITIES:
            raise ValueError(f'activities must be "cpu" or "cuda", got {name!r}')
    lower = [name.lower() for name in names]
    return [ACTIVITIES[name] for name in lower if name != "cuda" or torch.cuda.is_available()]


def _schedule(arguments: dict[str, Any] | None) -> Callable[[int], Any] | None:
    return None if arguments is None else schedule(**arguments)


def _check_handler(handler: Any) -> None:
    if handler is None or callable(handler):
        return
    if not isinstance(handler, dict):
        raise ValueError(f"on_trace_ready must be a callable, a dict or None, got {type(handler).__name__}")
    if handler.get("type") not in ("log_trace", "tb_trace"):
        raise ValueError(f'on_trace_ready needs type="log_trace" or type="tb_trace", got {handler.get("type")!r}')


def _handler(handler: Any, work_dir: str) -> Callable[[Any], Any] | None:
    """What torch calls with the profiler whenever a trace is ready."""
    if not isinstance(handler, dict):
        return handler  # type: ignore[no-any-return]
    arguments = {key: value for key, value in handler.items() if key != "type"}
    if handler["type"] == "log_trace":
        return lambda profiler: print(profiler.key_averages().table(**arguments))
    folder = os.path.join(work_dir, arguments.pop("dir_name", None) or "tf_tracing_logs")
    return tensorboard_trace_handler(folder, **arguments)  # type: ignore[no-any-return]
