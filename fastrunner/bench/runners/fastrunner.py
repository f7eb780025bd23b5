"""fastrunner with its default hooks. The variants are recipes of the step (``step=dict(recipe=...)``).

One runner trains in all calls, as in a real run: a new one would compile again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

from ...hooks.logger.base import LoggerHook
from ...runner import build_runner
from ...step.config import RECIPES
from . import Task

PACKAGE = None
VARIANTS = ("fused", *(recipe for recipe in RECIPES if recipe != "fused"))
TYPES = {"iter": "IterBasedRunner", "epoch": "EpochBasedRunner"}
AT_ONCE = ("eager", "fused")  # recipes that compile nothing
FEWEST, PASS = 2, 4  # passes before a recipe can have settled; batches of a pass


def make(task: Task, length: int) -> Any:
    """A runner for ``task.epochs`` times ``length`` iterations, hooks registered."""
    stop = {"max_epochs": task.epochs} if task.runner == "epoch" else {"max_iters": task.epochs * length}
    step = {"recipe": task.variant, "amp": task.amp, "channels_last": task.channels_last}
    runner = build_runner(
        {"type": TYPES[task.runner], "step": step, **stop},
        default_args={
            "model": task.model,
            "optimizer": task.optimizer,
            "work_dir": str(task.folder),
            "logger": task.logger,
        },
    )
    runner.register_training_hooks(
        lr_config={"policy": "fixed"},
        optimizer_config={"grad_clip": None if task.max_norm is None else {"max_norm": task.max_norm}},
        checkpoint_config=None,
        log_config={"interval": task.log_interval, "hooks": [{"type": "TextLoggerHook"}]},
    )
    return runner


def kept(task: Task, length: int) -> Any:
    """The runner of all calls with this task's memory, that much longer."""
    runner = task.kept.get("runner")
    if runner is None:
        runner = task.kept["runner"] = make(task, length)
        return runner
    if task.runner == "epoch":
        runner._max_epochs = runner.epoch + task.epochs
    else:
        runner._max_iters = runner.iter + task.epochs * length
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook):
            hook.interval = task.log_interval
    return runner


def train(task: Task, source: Any) -> None:
    kept(task, len(source)).run([source], [("train", 1)])


def settle(task: Task, batches: Sequence[Any], most_s: float) -> bool:
    """Train until nothing is being compiled any more; whether that came in time."""
    if task.variant in AT_ONCE:
        return True
    batches = batches[:PASS]
    runner = kept(task, len(batches))
    source = _Until(runner, batches, monotonic() + most_s)
    runner.run([source], [("train", 1)])
    return not source.late


def explain(task: Task) -> dict[str, Any]:
    step = kept(task, 1).step
    return {"step": step.explain(), "whole": step.num_whole > 0}


class _Until:
    """Batches over and over, in a run that is lengthened at the start of each pass while something is compiled.

    Attributes:
        late: the time was over, and something was still being compiled.
    """

    def __init__(self, runner: Any, batches: Sequence[Any], until: float) -> None:
        self._runner, self._batches, self._until = runner, batches, until
        self._passes, self.late = 0, False

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        self._passes += 1
        runner, compiling = self._runner, self._runner.step.compiling
        self.late = compiling and monotonic() >= self._until
        if self._passes < FEWEST or (compiling and not self.late):
            if hasattr(runner, "_max_epochs") and runner._max_epochs is not None:
                runner._max_epochs = runner.epoch + 2
            else:
                runner._max_iters = runner.iter + 2 * len(self._batches)
        yield from self._batches
