"""Where each single iteration of a run goes: its parts, the stalls with their causes, what each hook costs.

Two passes, because clocks cost time: one with clocks between the groups of hooks, one with a clock around each hook's
method (which makes the runner call it every time, as MMCV does). An iteration that is one compiled call has nothing
between its hooks: there, only the data and the log have clocks.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter_ns
from typing import Any

from ..hooks.hook import Hook
from ..hooks.logger.base import LoggerHook
from ..plan.dispatch import STAGES
from .measure import StampedSource
from .runners import Task
from .runners.fastrunner import AT_ONCE, kept, make
from .training import PARTS, logged_losses, register_clocks, split_parts

STALL = 2.0  # an iteration is a stall where it takes so many times the median
CAUSES = {"data": "data", "step": "step", "hooks": "checkpoint", "logging": "log", "rest": "epoch end"}


def account(task: Task, batches: Sequence[Any]) -> dict[str, Any]:
    """Train over ``batches`` (a list) ``task.epochs`` times with clocks; a few of them again for the hooks.

    Returns:
        parts (name -> nanoseconds of each iteration), begins (nanoseconds since the first), stalls, losses, log
        interval, hooks (name -> nanoseconds an iteration), plan (as text), whole (whether iterations were one call).
    """
    runner = kept(task, len(batches))
    whole = task.variant not in AT_ONCE and runner.step.num_whole > 0
    if not whole:
        task = replace(task, variant=task.variant if task.variant in AT_ONCE else "fused")  # the recipe below
        runner = make(task, len(batches))
    clock = LogClock(next(hook for hook in runner.hooks if isinstance(hook, LoggerHook)))
    if whole:
        runner.register_hook(clock, 80)  # between the timer (70) and the loggers (90)
        runner.register_hook(clock.after, "LOWEST")
    stamps = {} if whole else register_clocks(runner, None)
    source, pauses = StampedSource(batches), GcPauses()
    with pauses:
        runner.run([source], [("train", 1)])
    last = len(source.asked_ns) - 1  # the last iteration has no end: nothing is asked for after it
    first = min(2, last)
    parts = whole_parts(source, clock, range(first, last)) if whole else split_parts(source, stamps, range(first, last))
    begins = [source.asked_ns[i] for i in range(first, last)]
    return {
        "parts": parts,
        "begins": [begin - begins[0] for begin in begins],
        "stalls": stalls(parts, begins, pauses.seen),
        "losses": logged_losses(task.folder / f"{runner.timestamp}.log.json")[
            -len(source.asked_ns) // task.log_interval :
        ],
        "log_interval": task.log_interval,
        "hooks": hook_costs(task, batches[: max(2, len(batches) // 4)]),
        "plan": _plan(task, batches[:2], runner),
        "whole": whole,
    }


def _plan(task: Task, batches: Sequence[Any], runner: Any) -> str:
    """The plan without clocks."""
    if task.variant in AT_ONCE:
        runner = make(task, len(batches))
        runner.run([list(batches)], [("train", 1)])
    else:
        runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, (LogClock, _After))]
    text: str = runner.explain()
    return text


class LogClock(Hook):
    """Looks at the clock before the loggers and, by its ``after``, after them, in iterations that log: it is called in
    no other one, so that those can be one compiled call.

    Attributes:
        seen: iteration, counted from the run's first -> (before, after), ``perf_counter_ns``.
    """

    def __init__(self, logger: LoggerHook) -> None:
        self._logger, self.seen = logger, dict[int, tuple[int, int]]()
        self._first = self._before = 0
        self.after = _After(self)

    def before_run(self, runner: Any) -> None:
        self._first = runner.iter

    def due(self, runner: Any) -> int:
        return self._logger.due(runner)

    def after_train_iter(self, runner: Any) -> None:
        self._before = perf_counter_ns()

    def end(self, runner: Any) -> None:
        self.seen[runner.iter - self._first] = (self._before, perf_counter_ns())


class _After(Hook):
    """The second half of a LogClock."""

    def __init__(self, clock: LogClock) -> None:
        self._clock = clock

    def due(self, runner: Any) -> int:
        return self._clock.due(runner)

    def after_train_iter(self, runner: Any) -> None:
        self._clock.end(runner)


def whole_parts(source: StampedSource, clock: LogClock, iterations: range) -> dict[str, list[float]]:
    """Nanoseconds of the parts of iterations that are one call: data, log, and all else as the step; where an epoch
    ends, what is more than a step usually takes is the rest."""
    parts: dict[str, list[float]] = {part: [0.0] * len(iterations) for part in PARTS}
    for row, i in enumerate(iterations):
        begin, end = clock.seen.get(i, (0, 0))
        parts["data"][row] = source.given_ns[i] - source.asked_ns[i]
        parts["logging"][row] = end - begin
        whole = source.asked_ns[i + 1] - source.asked_ns[i]
        parts["step"][row] = whole - parts["data"][row] - parts["logging"][row]
    usual = median(parts["step"]) if len(iterations) else 0.0
    for row, i in enumerate(iterations):
        if (i + 1) % len(source) == 0:
            parts["rest"][row] = max(0.0, parts["step"][row] - usual)
            parts["step"][row] -= parts["rest"][row]
    return parts


class GcPauses:
    """Notes when Python's collector ran: (begin, end) in ``perf_counter_ns``."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self._begin = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begin = perf_counter_ns()
        else:
            self.seen.append((self._begin, perf_counter_ns()))

    def __enter__(self) -> None:
        gc.callbacks.append(self)

    def __exit__(self, *error: object) -> None:
        gc.callbacks.remove(self)


def stalls(
    parts: dict[str, list[float]], begins: Sequence[int], pauses: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Iterations that took more than STALL times the median: {index, ns, cause}; the cause is "GC" where the collector
    took most of what is too much, else the part that exceeds its own median by the most."""
    wholes = [sum(parts[part][i] for part in PARTS) for i in range(len(begins))]
    if not wholes:
        return []
    usual, usual_parts = median(wholes), {part: median(parts[part]) for part in PARTS}
    found = []
    for i, whole in enumerate(wholes):
        if whole <= STALL * usual:
            continue
        end = begins[i] + whole
        swept = sum(max(0, min(b, end) - max(a, begins[i])) for a, b in pauses)
        cause = CAUSES[max(PARTS, key=lambda part: parts[part][i] - usual_parts[part])]
        found.append({"index": i, "ns": whole, "cause": "GC" if swept > (whole - usual) / 2 else cause})
    return found


def hook_costs(task: Task, batches: Sequence[Any]) -> dict[str, float]:
    """Nanoseconds an iteration in each hook's methods, called one by one; the optimizer hook's hold the backward."""
    runner = make(replace(task, variant="fused"), len(batches))  # in a compiled call no hook is called
    spent: dict[str, float] = {}
    for hook in runner.hooks:
        for stage in STAGES:
            method = getattr(hook, stage)
            if getattr(type(hook), stage) is not getattr(Hook, stage):
                setattr(hook, stage, _timed(method, type(hook).__name__, spent))
    runner.run([list(batches)], [("train", 1)])
    return {name: ns / len(batches) for name, ns in spent.items()}


def _timed(method: Any, name: str, spent: dict[str, float]) -> Any:
    spent.setdefault(name, 0.0)

    def call(runner: Any) -> None:
        begin = perf_counter_ns()
        method(runner)
        spent[name] += perf_counter_ns() - begin

    return call


def trace(found: dict[str, Any]) -> dict[str, Any]:
    """An account as a trace that https://ui.perfetto.dev opens (Trace Event Format: ``ph`` X, ``ts`` and ``dur`` in
    microseconds): a row for the iterations, a row for their parts, marks for the stalls."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((1, "iterations"), (2, "parts"))
    ]
    causes = {stall["index"]: stall["cause"] for stall in found["stalls"]}
    for i, begin in enumerate(found["begins"]):
        at = float(begin)
        whole = sum(found["parts"][part][i] for part in PARTS)
        name = f"iteration, stall: {causes[i]}" if i in causes else "iteration"
        events.append(_event(name, 1, at, whole, {"index": i}))
        for part in PARTS:  # in the order in which most of each happens
            ns = max(0.0, found["parts"][part][i])
            events.append(_event(part, 2, at, ns, {}))
            at += ns
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _event(name: str, tid: int, begin_ns: float, ns: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": begin_ns / 1e3, "dur": ns / 1e3, "args": args}
