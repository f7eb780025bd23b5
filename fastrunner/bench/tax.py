"""The runner tax: what a runner adds to an iteration of a loop written by hand that does the same arithmetic.

Both sides use one model, one optimizer and the same batches in memory, take turns in one process, and are timed by the
data source, so that neither has a clock in its loop. The hooks are the defaults of ``register_training_hooks``.

Behind a real step a tax of microseconds drowns in the step's own variation; so it is measured a second time over a step
that does nothing, where the tax is all there is.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hooks import Hook
from ..optim.fused import FusedSGD
from .measure import Timing, Window, difference, interleaved
from .training import MAX_NORM, Plan, make_runner

NEVER = 10**9
LEAD = 60  # iterations before the clock starts: the warm-up of the lr (50) is over, and with it what is due
STEADY = 1100  # and here a run has forgotten its beginning, and just put 1,024 rows of its log together


def step_tax(
    runner: str,
    model: Any,
    optimizer: Any,
    batches: Sequence[Any],
    *,
    num_iters: int,
    rounds: int,
    work_dir: Path,
    logger: logging.Logger,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The tax over a real step, between due points: in the timed iterations there is nothing to log or to save."""

    def by_runner(window: Window) -> None:
        made = make_runner(_plan(runner, window), model, optimizer, work_dir, logger, **_nothing_due())
        made.run([window], [("train", 1)])

    def by_hand(window: Window) -> None:
        model.train()
        for batch in window:
            outputs = model.train_step(batch, optimizer)
            optimizer.zero_grad()
            outputs["loss"].backward()
            optimizer.clipped_step(MAX_NORM)

    return _compare(by_hand, by_runner, batches, num_iters, rounds, synchronize)


def noop_tax(
    runner: str,
    *,
    num_iters: int,
    rounds: int,
    work_dir: Path,
    logger: logging.Logger,
    log_interval: int | None = None,
    hooks: Callable[[], Sequence[tuple[Hook, int | str]]] = tuple,
) -> dict[str, Any]:
    """The tax over a step that does nothing: ``train_step`` returns the same dict, backward and update are empty.

    Args:
        log_interval: log every so many iterations; None: nothing is due in the timed iterations.
        hooks: makes further hooks, with their priorities, for each run.
    """
    by_runner = _noop_run(runner, work_dir, logger, log_interval, hooks)

    def by_hand(window: Window) -> None:
        model, optimizer = _noops()
        model.train()
        for batch in window:
            outputs = model.train_step(batch, optimizer)
            optimizer.zero_grad()
            outputs["loss"].backward()
            optimizer.clipped_step(MAX_NORM)

    return _compare(by_hand, by_runner, [{}], num_iters, rounds, None)


def hooks_tax(
    runner: str,
    hooks: Callable[[], Sequence[tuple[Hook, int | str]]],
    *,
    num_iters: int,
    rounds: int,
    work_dir: Path,
    logger: logging.Logger,
) -> dict[str, Any]:
    """What further hooks add to the default ones, over the same step: "bare" is the runner without them.

    From iteration STEADY on: what many hooks touch before a run begins, and their list in the log, make its
    first 200 iterations 0.1 us slower; at iteration 400 there is 0.01 us left, here nothing that A against A has not.
    """
    without, with_them = (_noop_run(runner, work_dir, logger, None, more) for more in (tuple, hooks))
    return _compare(without, with_them, [{}], num_iters, rounds, None, lead=STEADY)


def _noop_run(
    runner: str,
    work_dir: Path,
    logger: logging.Logger,
    log_interval: int | None,
    hooks: Callable[[], Sequence[tuple[Hook, int | str]]],
) -> Callable[[Window], None]:
    def by_runner(window: Window) -> None:
        model, optimizer = _noops()
        plan = _plan(runner, window)
        made = make_runner(plan, model, optimizer, work_dir, logger, **_nothing_due(log_interval))
        for hook, priority in hooks():
            made.register_hook(hook, priority)
        made.run([window], [("train", 1)])

    return by_runner


def _noops() -> tuple[NoopModel, NoopOptimizer]:
    model = NoopModel()
    return model, NoopOptimizer(model.parameters(), lr=0.1)


class NoopModel(nn.Module):
    """A model whose training step costs a method call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        loss = torch.zeros((), requires_grad=True)
        loss.backward = lambda: None  # type: ignore[method-assign,assignment,misc]  # of this tensor only
        self.outputs = {"loss": loss, "log_vars": {"loss": loss.detach()}, "num_samples": 1}

    def train_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        return self.outputs


class NoopOptimizer(FusedSGD):
    """An optimizer that does not optimise. (torch.optim's own constructors import dynamo, 2 s; this one does not.)"""

    grad_norm = torch.zeros(())

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        pass

    def clipped_step(self, max_norm: float, *, write_back: bool = True) -> torch.Tensor:
        return self.grad_norm

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps every class's step in a profiler range, 10 us, else


def _plan(runner: str, window: Window) -> Plan:
    return Plan(runner, num_iters=len(window), epoch_length=len(window), log_interval=NEVER)


def _constant_after_warmup() -> dict[str, Any]:
    return {"policy": "step", "step": [NEVER], "by_epoch": False, "warmup": "linear", "warmup_iters": 50}


def _nothing_due(log_interval: int | None = None) -> dict[str, Any]:
    """Configs with which no checkpoint and no log is due in the timed iterations (or a log each ``log_interval``), and
    the lr stays: its warm-up is over with the first iteration, which is not timed."""
    return {
        "lr_config": {"policy": "step", "step": [NEVER], "by_epoch": False, "warmup": "linear", "warmup_iters": 1},
        "checkpoint_config": {"interval": NEVER, "save_last": False},
        "log_config": {"interval": log_interval or NEVER, "hooks": [{"type": "TextLoggerHook"}]},
    }


def _compare(
    by_hand: Callable[[Window], None],
    by_runner: Callable[[Window], None],
    batches: Sequence[Any],
    num_iters: int,
    rounds: int,
    synchronize: Callable[[], None] | None,
    lead: int = 0,
) -> dict[str, Any]:
    def timed(loop: Callable[[Window], None]) -> Callable[[], float]:
        def sample() -> float:
            window = Window(batches, num_iters, synchronize, lead)
            gc.disable()  # whether one of its sweeps (some 20 us) falls into a short window is chance
            try:
                loop(window)
            finally:
                gc.enable()
            return window.ns_per_iter

        return sample

    if not lead:
        lead = 1 if num_iters < LEAD else LEAD  # a real step is slow: a policy call does not show behind it
    by_hand(Window(batches, 1, synchronize))  # first calls: allocations, code caches
    by_runner(Window(batches, 1, synchronize))
    samples = interleaved({"bare": timed(by_hand), "runner": timed(by_runner)}, rounds)
    delta = difference(samples["runner"], samples["bare"])
    return {
        "rounds": rounds,
        "iters_per_round": num_iters,
        "bare": Timing(tuple(samples["bare"])).summary(),
        "runner": Timing(tuple(samples["runner"])).summary(),
        "tax_us": {
            "median": delta.median_ns / 1e3,
            "low": delta.low_ns / 1e3,
            "high": delta.high_ns / 1e3,
            "confidence": delta.confidence,
            "of_minima": (min(samples["runner"]) - min(samples["bare"])) / 1e3,
            "contains_zero": delta.contains_zero,
        },
    }
