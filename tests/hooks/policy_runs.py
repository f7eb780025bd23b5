"""Runs that do nothing but show what a policy writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastrunner import EpochBasedRunner, Hook, IterBasedRunner

RUNNERS = [EpochBasedRunner, IterBasedRunner]


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def train_step(self, data_batch, optimizer, **kwargs):
        return dict(loss=data_batch)

    val_step = train_step


class Record(Hook):
    def __init__(self, what: str) -> None:
        self.what, self.rows = what, []

    def after_train_iter(self, runner):
        self.rows.append(getattr(runner, f"current_{self.what}")())


class StopAfter(Hook):
    def __init__(self, iters: int) -> None:
        self.iters = iters

    def after_train_iter(self, runner):
        if runner.iter + 1 == self.iters:
            runner.stop("enough")


def make(
    what: str,
    values: Sequence[float],
    kind: Any = IterBasedRunner,
    length: int = 6,
    optimizer: Any = None,
    work_dir: str | None = None,
) -> Any:
    """A runner whose run is ``length`` iterations: epochs of two, where it counts epochs.

    Its optimizer is SGD with two groups, in which ``what`` ("lr" or "momentum") has these values.
    """
    model = Idle()
    if optimizer is None:
        groups = [{"params": [p], what: value} for p, value in zip((model.w, model.b), values, strict=True)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    limit = dict(max_iters=length) if kind is IterBasedRunner else dict(max_epochs=length // 2)
    return kind(model, optimizer=optimizer, work_dir=work_dir, **limit)


def run(what: str, runner: Any, config: dict[str, Any] | None = None, batches: int = 2) -> list[Any]:
    """``what`` of all groups at each iteration of a run with this ``lr_config`` or ``momentum_config``."""
    getattr(runner, f"register_{what}_hook")(config)
    record = Record(what)
    runner.register_hook(record, "LOWEST")
    runner.run([[torch.ones(1)] * batches], [("train", 1)])
    return record.rows
