"""Where each single iteration of a run goes: its parts, the stalls with their causes, what each hook costs.

Two passes, because clocks cost time: one with clocks between the groups of hooks, one with a clock around each hook's
method (which makes the runner call it every time, as MMCV does).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from statistics import median
from time import perf_counter_ns
from typing import Any

from ..hooks.hook import Hook
from ..plan.dispatch import STAGES
from .measure import StampedSource
from .runners import Task
from .runners.fastrunner import make
from .training import PARTS, logged_losses, register_clocks, split_parts

STALL = 2.0  # an iteration is a stall where it takes so many times the median
CAUSES = {"data": "data", "step": "step", "hooks": "checkpoint", "logging": "log", "rest": "epoch end"}


def account(task: Task, batches: Sequence[Any]) -> dict[str, Any]:
    """Train over ``batches`` (a list) with clocks; a few of them again for the hooks.

    Returns:
        parts (name -> nanoseconds of each iteration), begins (nanoseconds since the first), stalls, losses, log
        interval, hooks (name -> nanoseconds an iteration).
    """
    runner = make(task, len(batches))
    stamps = register_clocks(runner, None)
    source = StampedSource(batches)
    pauses = GcPauses()
    with pauses:
        runner.run([source], [("train", 1)])
    last = len(source.asked_ns) - 1  # the last iteration has no end: nothing is asked for after it
    parts = split_parts(source, stamps, range(min(2, last), last))
    first = min(2, last)
    begins = [source.asked_ns[i] for i in range(first, last)]
    return {
        "parts": parts,
        "begins": [begin - begins[0] for begin in begins],
        "stalls": stalls(parts, begins, pauses.seen),
        "losses": logged_losses(task.folder / f"{runner.timestamp}.log.json"),
        "log_interval": task.log_interval,
        "hooks": hook_costs(task, batches[: max(2, len(batches) // 4)]),
        "plan": _plan(task, batches[:2]),
    }


def _plan(task: Task, batches: Sequence[Any]) -> str:
    """The plan without clocks."""
    runner = make(task, len(batches))
    runner.run([list(batches)], [("train", 1)])
    text: str = runner.explain()
    return text


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
    runner = make(task, len(batches))
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
