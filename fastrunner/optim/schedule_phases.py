"""Cyclic and one-cycle policies: a run in phases, each annealed from one multiple of the base value to another.

Sources: Smith 2017, https://arxiv.org/abs/1506.01186 (cyclic); Smith, Topin 2019, https://arxiv.org/abs/1708.07120 (one
cycle). As in MMCV and torch, one cycle ends its phases at fractional iterations, ``pct_start * total_steps - 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .schedule import annealing_cos, annealing_linear

Anneal = Callable[[float, float, float], float]

ANNEAL: dict[str, Anneal] = {"cos": annealing_cos, "linear": annealing_linear}


class CyclePhase(NamedTuple):
    """Iterations start..end of a cycle, and the multiples of the base value at both."""

    start: int
    end: int
    start_ratio: float
    end_ratio: float


def cyclic_phases(cycle: int, up: float, target_ratio: tuple[float, float]) -> list[CyclePhase]:
    """The share ``up`` of ``cycle`` iterations goes to the first target ratio, the rest to the second."""
    turn = int(up * cycle)
    return [CyclePhase(0, turn, 1, target_ratio[0]), CyclePhase(turn, cycle, *target_ratio)]


def cyclic_value(
    base: float, progress: int, cycle: int, phases: Sequence[CyclePhase], gamma: float, anneal: Anneal
) -> float:
    """Value at iteration ``progress``. In cycle k the turning point is only ``gamma**k`` as far from the base value.

    ``phases`` cover a whole cycle.
    """
    times, at = divmod(progress, cycle)
    scale = gamma**times
    start, end, start_ratio, end_ratio = next(phase for phase in phases if phase.start <= at < phase.end)
    if start == 0:
        end_ratio = 1 - scale + end_ratio * scale
    else:
        start_ratio = 1 - scale + start_ratio * scale
    return anneal(base * start_ratio, base * end_ratio, (at - start) / (end - start))


def one_cycle_ends(total_steps: int, pct_start: float, three_phase: bool) -> list[float]:
    """The last iteration of each phase: up, down; with ``three_phase`` up, as fast down, and on.

    Raises:
        ValueError: the way up is one iteration long, iteration 0, between whose ends nothing can be annealed.
    """
    up = float(pct_start * total_steps) - 1
    if up == 0:
        raise ValueError(
            f"pct_start={pct_start} of {total_steps} iterations is a single one, too short for a way up: "
            "use a larger pct_start, or 0.0 for none"
        )
    down = [float(2 * pct_start * total_steps) - 2] if three_phase else []
    return [up, *down, total_steps - 1]


def find_phase(progress: int, ends: Sequence[float]) -> tuple[int, float]:
    """Which phase ``progress`` is in, and how far: 0 at its start, 1 at its end.

    Behind the last end it is the last phase, and further than 1 (1 where that phase has no length).
    """
    start: float = 0
    for index, end in enumerate(ends):
        if progress <= end or index == len(ends) - 1:
            return index, (progress - start) / (end - start) if end != start else 1.0
        start = end
    raise ValueError("one cycle needs at least one phase")
