"""MMCV 1.7.2, as shipped and with its sleeps taken out (``worker.py`` takes them out).

It imports torchvision to look models up by name; beside a CPU build of torch 2.13 that does not import, and an empty
stand-in is enough. ``log_vars`` are numbers there: each is read from the device in every iteration, as mmdet's
``_parse_losses`` does.
"""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from typing import Any

from torch import nn

from . import AsLoader, Task

PACKAGE = "mmcv"
VARIANTS = ("shipped", "nosleep")
NOTE = "mmcv: torchvision is a stub"
TYPES = {"iter": "IterBasedRunner", "epoch": "EpochBasedRunner"}


class Numbers(nn.Module):
    """The model with ``log_vars`` that MMCV's log buffer can average."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train_step(self, batch: Any, optimizer: Any, **kwargs: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = self.model.train_step(batch, optimizer)  # type: ignore[operator]
        outputs["log_vars"] = {name: value.item() for name, value in outputs["log_vars"].items()}
        return outputs


def prepare() -> None:
    """Put the stand-in where torchvision is not installed."""
    if "torchvision" not in sys.modules and find_spec("torchvision") is None:
        sys.modules["torchvision"] = types.ModuleType("torchvision")


def train(task: Task, source: Any) -> None:
    prepare()
    from mmcv import runner as mmcv_runner

    stop = {"max_epochs": task.epochs} if task.runner == "epoch" else {"max_iters": task.iterations(source)}
    runner = getattr(mmcv_runner, TYPES[task.runner])(
        Numbers(task.model), optimizer=task.optimizer, work_dir=str(task.folder), logger=task.logger, **stop
    )
    by_epoch = task.runner == "epoch"
    runner.register_training_hooks(
        lr_config={"policy": "fixed"},
        optimizer_config={"grad_clip": None if task.max_norm is None else {"max_norm": task.max_norm}},
        checkpoint_config=None,
        log_config={"interval": task.log_interval, "hooks": [{"type": "TextLoggerHook", "by_epoch": by_epoch}]},
    )
    runner.run([AsLoader(source)], [("train", 1)])
