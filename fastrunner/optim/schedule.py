"""Policies of learning rate and momentum, and warm-up, as pure functions of (base value, progress).

    cosine:  end + (start - end) * (1 + cos(pi * factor)) / 2        linear:  start + (end - start) * factor
Sources: Loshchilov, Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5 (cosine, restarts); Goyal et al. 2017,
https://arxiv.org/abs/1706.02677, section 2.2 (linear warm-up). Cyclic policies: ``schedule_phases``.

The arithmetic keeps MMCV's order of operations, since schedules are compared with ``==``. ``progress`` counts finished
epochs or iterations, ``length`` is the number of them in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi

WARMUPS = ("constant", "linear", "exp")


def annealing_cos(start: float, end: float, factor: float, weight: float = 1.0) -> float:
    """Half a cosine from ``weight * start + (1 - weight) * end`` to ``end``, as ``factor`` goes from 0 to 1."""
    return end + 0.5 * weight * (start - end) * (cos(pi * factor) + 1)


def annealing_linear(start: float, end: float, factor: float) -> float:
    """A line from ``start`` to ``end``, as ``factor`` goes from 0 to 1."""
    return start + (end - start) * factor


def step_value(base: float, progress: int, step: int | Sequence[int], gamma: float, floor: float | None) -> float:
    """``base * gamma**n``, where n counts the steps passed: multiples of an int, or entries of a list; at least floor.

    A list is used in the order given: n is the index of its first entry above ``progress``.
    """
    if isinstance(step, int):
        n = progress // step
    else:
        n = next((i for i, at in enumerate(step) if progress < at), len(step))
    value = base * gamma**n
    return value if floor is None else max(value, floor)


def next_step(progress: int, step: int | Sequence[int]) -> int:
    """The first progress from this one on at which ``step_value`` may change; beyond all numbers if it never does."""
    if isinstance(step, int):
        return progress + -progress % step
    return min((at for at in step if at >= progress), default=1 << 62)


def exp_value(base: float, progress: int, gamma: float) -> float:
    """``base * gamma**progress``."""
    return base * gamma**progress


def poly_value(base: float, progress: int, length: int, power: float, floor: float) -> float:
    """``(base - floor) * (1 - progress / length)**power + floor``.

    Raises:
        ValueError: ``progress`` is behind the end, where a fractional power is not a real number.
    """
    left = (1 - progress / length) ** power
    if isinstance(left, complex):
        raise ValueError(f"progress {progress} is behind the end of the run, {length}; power={power} ends there")
    return float((base - floor) * left + floor)


def inv_value(base: float, progress: int, gamma: float, power: float) -> float:
    """``base / (1 + gamma * progress)**power``."""
    return float(base * (1 + gamma * progress) ** (-power))


def cosine_value(base: float, target: float, progress: int, length: int) -> float:
    """From ``base`` to ``target`` over the run, along half a cosine."""
    return annealing_cos(base, target, progress / length)


def linear_value(base: float, target: float, progress: int, length: int) -> float:
    """From ``base`` to ``target`` over the run, along a line."""
    return annealing_linear(base, target, progress / length)


def flat_cosine_value(base: float, target: float, progress: int, length: int, start_percent: float) -> float:
    """``base`` for this share of the run, then half a cosine to ``target``."""
    start = round(length * start_percent)
    if progress < start:
        return base
    return annealing_cos(base, target, (progress - start) / (length - start))


def get_position_from_periods(iteration: int, cumulative_periods: Sequence[int]) -> int:
    """Index of the period that ``iteration`` is in: the first whose end is above it.

    ``cumulative_periods`` are the ends: for [100, 200, 300], iteration 50 is in period 0, and 200 in period 2.

    Raises:
        ValueError: it is behind the last one.
    """
    for index, end in enumerate(cumulative_periods):
        if iteration < end:
            return index
    raise ValueError(
        f"progress {iteration} is behind the last period, which ends at {max(cumulative_periods, default=0)}; "
        "make the periods add up to the length of the run"
    )


def cosine_restart_value(
    base: float, target: float, progress: int, periods: Sequence[int], ends: Sequence[int], weights: Sequence[float]
) -> float:
    """In each period half a cosine to ``target``, from ``weight * base + (1 - weight) * target``.

    ``ends`` are the sums of the periods so far; one weight a period.
    """
    index = get_position_from_periods(progress, ends)
    start = ends[index - 1] if index else 0
    return annealing_cos(base, target, min((progress - start) / periods[index], 1), weights[index])


def warmup_factor(kind: str, cur_iter: int, warmup_iters: int, ratio: float) -> float:
    """What warm-up makes of a value of 1: it starts at ``ratio`` and rises to 1 (constant stays at ``ratio``).

    A learning rate is multiplied by it; a momentum is divided, and so starts high.
    """
    if kind == "constant":
        return ratio
    if kind == "linear":
        return 1 - (1 - cur_iter / warmup_iters) * (1 - ratio)
    if kind == "exp":
        return float(ratio ** (1 - cur_iter / warmup_iters))
    raise ValueError(f"warmup must be one of {WARMUPS}, got {kind!r}")
