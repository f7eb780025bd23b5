"""The four steps on a workload: once as it is, for speed and learning, and once with clocks between the hooks.

The two passes are separate because clocks cost time: the throughput comes from the first, which has no clock but the
one in its data source; the split of an iteration comes from the second.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

from ..hooks import ClosureHook
from ..optim import build_optimizer
from ..runner import build_runner
from .measure import StampedSource, Timing

OPTIMIZER = {"type": "FusedSGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
MAX_NORM = 5.0
RUNNERS = {"iter": "IterBasedRunner", "epoch": "EpochBasedRunner"}
PARTS = ("data", "step", "hooks", "logging", "rest")


@dataclass(frozen=True)
class Plan:
    """How long a run is, and how often its hooks act.

    Attributes:
        runner: "iter" or "epoch".
        num_iters: iterations of the run.
        epoch_length: batches an epoch; a checkpoint is written that often.
        log_interval: iterations between two log lines.
        step: recipe of the step.
    """

    runner: str
    num_iters: int
    epoch_length: int
    log_interval: int
    step: str = "fused"

    @classmethod
    def make(cls, runner: str, num_iters: int, epoch_length: int, step: str = "fused") -> Plan:
        """``num_iters`` iterations, for the epoch runner rounded up to whole epochs; 16 log lines or more."""
        if runner == "epoch":
            num_iters = math.ceil(num_iters / epoch_length) * epoch_length
        log_interval = max(1, min(50, num_iters // 16, epoch_length))
        return cls(runner, num_iters, epoch_length, log_interval, step)


def make_runner(plan: Plan, model: Any, optimizer: Any, work_dir: Path, logger: logging.Logger, **changes: Any) -> Any:
    """Steps 2 and 3: a runner with the default hooks: step lr with warmup, clip, checkpoint, timer, text log.

    Args:
        changes: configs that replace the ones made here, e.g. ``checkpoint_config``.
    """
    length = (
        {"max_epochs": plan.num_iters // plan.epoch_length} if plan.runner == "epoch" else {"max_iters": plan.num_iters}
    )
    runner = build_runner(
        {"type": RUNNERS[plan.runner], "step": plan.step, **length},
        default_args={"model": model, "optimizer": optimizer, "work_dir": str(work_dir), "logger": logger},
    )
    configs: dict[str, Any] = {
        "lr_config": {
            "policy": "step",
            "step": [max(1, 2 * plan.num_iters // 3)],
            "by_epoch": False,
            "warmup": "linear",
            "warmup_iters": max(1, min(50, plan.num_iters // 6)),
        },
        "optimizer_config": {"grad_clip": {"max_norm": MAX_NORM}},
        "checkpoint_config": {"interval": 1 if plan.runner == "epoch" else plan.epoch_length},
        "log_config": {"interval": plan.log_interval, "hooks": [{"type": "TextLoggerHook"}]},
    }
    runner.register_training_hooks(**{**configs, **changes})
    return runner


def train(
    plan: Plan,
    model: Any,
    loader: Any,
    work_dir: Path,
    logger: logging.Logger,
    num_warm_iter: int,
    synchronize: Callable[[], None] | None,
    explain: bool = False,
) -> dict[str, Any]:
    """The measured run. Its throughput is over all iterations between the warm-up and the last one, which closes the
    window; epoch ends, logs and checkpoints are in it.

    Args:
        explain: put ``runner.explain()`` into the result; the first 10 iterations are watched, and slow.
    """
    optimizer = build_optimizer(model, OPTIMIZER)
    runner = make_runner(plan, model, optimizer, work_dir, logger)
    if explain:
        runner.explain()  # from here on
    source = StampedSource(loader, synchronize, frozenset((num_warm_iter, plan.num_iters - 1)))
    log = work_dir / f"{runner.timestamp}.log.json"
    written = log.stat().st_size if log.exists() else 0  # by a run that began in the same second
    runner.run([source], [("train", 1)])

    asked, given = source.asked_ns[num_warm_iter:], source.given_ns[num_warm_iter:]
    iters = Timing(tuple(after - before for before, after in pairwise(asked)))
    data = Timing(tuple(after - before for before, after in zip(asked[:-1], given[:-1], strict=True)))
    seconds = (asked[-1] - asked[0]) / 1e9
    losses = logged_losses(log, written)
    return {
        "num_iters": runner.iter,
        "num_epochs": runner.epoch,
        "warm_iters": num_warm_iter,
        "timed_iters": len(iters.samples_ns),
        "iters_per_s": len(iters.samples_ns) / seconds,
        "samples_per_s": len(iters.samples_ns) * loader.batch_size / seconds,
        "iter": iters.summary(),
        "data_wait": data.summary(),
        "log_interval": plan.log_interval,
        "losses": losses,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "plan": runner.explain() if explain else None,
    }


def logged_losses(file: Path, begin: int = 0) -> list[float]:
    """The losses in a ``.log.json`` from byte ``begin`` on: each the mean over one log interval."""
    records = [json.loads(line) for line in file.read_bytes()[begin:].splitlines()]
    return [record["loss"] for record in records if record.get("mode") == "train"]


@torch.no_grad()
def evaluate(model: Any, loader: Any) -> dict[str, Any]:
    """Accuracy over a validation loader, by a plain loop over ``val_step``."""
    model.eval()
    correct, num_samples = 0.0, 0
    for batch in loader:
        outputs = model.val_step(batch, None)
        correct += float(outputs["log_vars"]["acc"]) * outputs["num_samples"]
        num_samples += outputs["num_samples"]
    return {"accuracy": correct / num_samples, "num_samples": num_samples}


def split(
    plan: Plan,
    model: Any,
    loader: Any,
    work_dir: Path,
    logger: logging.Logger,
    num_warm_iter: int,
    synchronize: Callable[[], None] | None,
) -> dict[str, Any]:
    """Where an iteration goes, from clocks before and after each group of hooks.

    | part    | from                     | to                                                              |
    |---------|--------------------------|-----------------------------------------------------------------|
    | data    | the batch is asked for   | it is there                                                     |
    | step    | the hooks before it ran  | the optimizer hook is done: forward, backward, clip, update     |
    | hooks   |                          | before the step: lr, timer; after it: checkpoint, timer, custom |
    | logging |                          | the loggers are done                                            |
    | rest    | the remainder: the loop itself, the clocks, epoch ends |                                   |

    On a GPU the clocks before and after the step wait for the device; otherwise its time would fall on the next part.
    """
    runner = make_runner(plan, model, build_optimizer(model, OPTIMIZER), work_dir, logger)
    stamps = register_clocks(runner, synchronize)
    source = StampedSource(loader)
    runner.run([source], [("train", 1)])
    # the last iteration has no end: nothing is asked for after it
    parts = split_parts(source, stamps, range(num_warm_iter, plan.num_iters - 1))
    return {
        "timed_iters": len(parts["data"]),
        "mean_ns": {part: sum(samples) / len(samples) for part, samples in parts.items()},
        "mean_ready": sum(source.ready) / len(source.ready) if source.ready else None,
        "samples_ns": parts,
    }


def register_clocks(runner: Any, synchronize: Callable[[], None] | None) -> dict[str, list[int]]:
    """Clocks between the groups of hooks; the lists that they fill, one entry an iteration."""
    stamps: dict[str, list[int]] = {}
    for name, stage, priority, wait in (
        ("start", "before_train_iter", "HIGHEST", False),
        ("forward", "before_train_iter", "LOWEST", True),
        ("updated", "after_train_iter", 45, True),  # between the optimizer hook (40) and checkpoints (50)
        ("hooked", "after_train_iter", 80, False),  # between the timer (70) and the loggers (90)
        ("logged", "after_train_iter", "LOWEST", False),
    ):
        stamps[name] = []
        runner.register_hook(_clock(stage, stamps[name], synchronize if wait else None), priority)
    return stamps


def split_parts(source: StampedSource, stamps: dict[str, list[int]], iterations: range) -> dict[str, list[float]]:
    """Nanoseconds of each part of these iterations, from the stamps of the source and of ``register_clocks``."""
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for i in iterations:
        parts["data"].append(source.given_ns[i] - source.asked_ns[i])
        parts["step"].append(stamps["updated"][i] - stamps["forward"][i])
        parts["hooks"].append(stamps["forward"][i] - stamps["start"][i] + stamps["hooked"][i] - stamps["updated"][i])
        parts["logging"].append(stamps["logged"][i] - stamps["hooked"][i])
        whole = source.asked_ns[i + 1] - source.asked_ns[i]
        parts["rest"].append(whole - sum(parts[part][-1] for part in PARTS if part != "rest"))
    return parts


def _clock(stage: str, stamps: list[int], synchronize: Callable[[], None] | None) -> ClosureHook:
    def note(runner: Any) -> None:
        if synchronize is not None:
            synchronize()
        stamps.append(perf_counter_ns())

    return ClosureHook(stage, note)
