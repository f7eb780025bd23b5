"""The runners that are compared, one a file. Each module has

    PACKAGE                what is imported, and pinned by ``make peers``; None: nothing beyond torch
    VARIANTS               names after the colon, e.g. ``mmcv:nosleep``; the first is the default
    train(task, source)    train over ``source`` ``task.epochs`` times, with that runner's best means

and, where something is compiled beside the training,

    settle(task, batches, most_s)    train over ``batches`` until all of it is there; whether that came in time
    explain(task)                    what it came to: dict(step=lines, whole=whether an iteration is one compiled call)

and runs in a process of its own (``worker.py``). ``source`` is what the timing looks through: every runner reads the
same one, and asks it for ``len(source)`` batches an epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Sized
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader

NAMES = ("raw", "fastrunner", "mmcv", "mmengine", "ignite", "accelerate", "lightning")
OWN = ("raw", "fastrunner")  # run in this environment; the others in that of the peers
GET = "make peers"  # puts the others into an environment of their own


@dataclass
class Task:
    """The same work for every runner.

    Args:
        runner: "iter" or "epoch": by which it counts, and when it stops.
        model: has ``train_step(batch, optimizer) -> dict(loss, log_vars, num_samples)``.
        optimizer: torch's, made once, in its fused form where it has one.
        max_norm: of the gradients; None: they are not clipped.
        log_interval: iterations between two lines in a log file, with the loss.
        folder: for the log; nothing else is written.
        variant: what is after the colon of the runner's name.
        epochs: how often the source is gone through.
        amp: "bf16" or None, for a runner with an option for it; other runners' models do it themselves.
        channels_last: likewise.
        kept: what a runner keeps from one call to the next: what it compiled.
    """

    runner: str
    model: Any
    optimizer: torch.optim.Optimizer
    max_norm: float | None
    log_interval: int
    folder: Path
    variant: str = ""
    epochs: int = 1
    amp: str | None = None
    channels_last: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    logger: logging.Logger = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.logger = logging.Logger("bench", logging.INFO)
        handler = logging.FileHandler(self.folder / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
        self.logger.addHandler(handler)

    def iterations(self, source: Sized) -> int:
        """Of one call of ``train``: the stop rule."""
        return self.epochs * len(source)


class AsLoader(DataLoader[Any]):
    """A source for runners that insist on a DataLoader: its own machinery is never started."""

    def __init__(self, source: Any) -> None:
        super().__init__(range(len(source)))  # type: ignore[arg-type]  # their hooks look at its samplers
        self._given = source

    def __iter__(self) -> Any:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def load(name: str) -> ModuleType:
    """The module of a runner. It imports its package only when it trains."""
    return import_module(f"{__name__}.{name}")


def split_name(full: str) -> tuple[str, str]:
    """``"mmcv:nosleep"`` -> ``("mmcv", "nosleep")``.

    Raises:
        ValueError: no such runner or variant; the message lists those that there are.
    """
    name, _, variant = full.partition(":")
    if name not in NAMES:
        raise ValueError(f"unknown runner {name!r}; choose from {', '.join(NAMES)}")
    variants = load(name).VARIANTS
    if variant and variant not in variants:
        raise ValueError(f"{name} has no variant {variant!r}; choose from {', '.join(variants)}")
    return name, variant or variants[0]
