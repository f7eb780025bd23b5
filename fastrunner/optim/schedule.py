"""Learning-rate policies and warm-up as pure functions of (base value, progress).

The arithmetic keeps MMCV's order of operations, since schedules are compared with ``==``. ``progress`` counts epochs or
iterations from 0; ``warmup_iters`` counts iterations.
"""

from __future__ import annotations

from collections.abc import Sequence


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


def warmup_lr(kind: str, lr: float, cur_iter: int, warmup_iters: int, ratio: float) -> float:
    """The warm-up value on the way to ``lr``: it starts at ``lr * ratio`` (constant stays there)."""
    if kind == "constant":
        return lr * ratio
    if kind == "linear":
        return lr * (1 - (1 - cur_iter / warmup_iters) * (1 - ratio))
    return float(lr * ratio ** (1 - cur_iter / warmup_iters))  # exp
