"""fastrunner with its default hooks. The variants are recipes of the step (``step=dict(recipe=...)``)."""

from __future__ import annotations

from typing import Any

from ...runner import build_runner
from ...step.config import RECIPES
from . import Task

PACKAGE = None
VARIANTS = ("fused", *(recipe for recipe in RECIPES if recipe != "fused"))
TYPES = {"iter": "IterBasedRunner", "epoch": "EpochBasedRunner"}


def make(task: Task, length: int) -> Any:
    """A runner for ``task.epochs`` times ``length`` iterations, hooks registered."""
    stop = {"max_epochs": task.epochs} if task.runner == "epoch" else {"max_iters": task.epochs * length}
    runner = build_runner(
        {"type": TYPES[task.runner], "step": {"recipe": task.variant}, **stop},
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


def train(task: Task, source: Any) -> None:
    make(task, len(source)).run([source], [("train", 1)])
