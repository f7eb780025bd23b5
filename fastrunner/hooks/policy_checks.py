"""Checks of what a policy's config says. Each message names the argument, and what would be right."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..optim.schedule_phases import ANNEAL, Anneal


def check_numbers(**named: Any) -> None:
    """Raises TypeError for what is not a number, ValueError for what is not finite."""
    for name, value in named.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            hint = " (yaml reads 1e-3 as text; write 1.0e-3)" if isinstance(value, str) else ""
            raise TypeError(f"{name} must be a number, got {value!r}{hint}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_one_of(**named: Any) -> None:
    """Exactly one of two is given, and it is a number."""
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {' and '.join(named)}, got {len(given)} of them")
    check_numbers(**given)


def check_steps(step: Any) -> None:
    """An int > 0 or a list of them."""
    if not isinstance(step, (int, list)) or isinstance(step, bool):
        raise TypeError(f"step must be an int or a list of ints, got {type(step).__name__}")
    if not all(isinstance(s, int) and s > 0 for s in ([step] if isinstance(step, int) else step)):
        raise ValueError(f"step must be positive, got {step}")


def check_share(name: str, value: Any) -> None:
    """A float in [0, 1]. An int is refused: 1 could mean one iteration."""
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a float in [0, 1], a share of the run; got {value!r}")


def check_anneal(strategy: Any) -> Anneal:
    """The function of this name."""
    if strategy not in ANNEAL:
        raise ValueError(f"anneal_strategy must be one of {tuple(ANNEAL)}, got {strategy!r}")
    return ANNEAL[strategy]


def check_by_iter(policy: str, by_epoch: bool) -> None:
    if by_epoch:
        raise ValueError(f"the {policy} policy counts iterations; leave by_epoch out, or say by_epoch=False")


def check_target_ratio(target_ratio: Any) -> tuple[float, float]:
    """(at the turning point, at the end); a single number x stands for (x, x / 1e5)."""
    if isinstance(target_ratio, numbers.Real):
        target_ratio = (target_ratio,)
    if not isinstance(target_ratio, (tuple, list)) or len(target_ratio) not in (1, 2):
        raise ValueError(f"target_ratio must be a number or a tuple of one or two, got {target_ratio!r}")
    check_numbers(**{f"target_ratio[{i}]": ratio for i, ratio in enumerate(target_ratio)})
    first = target_ratio[0]
    return first, target_ratio[1] if len(target_ratio) == 2 else first / 1e5


def check_cycles(cyclic_times: Any, step_ratio_up: Any, gamma: Any) -> None:
    """An int > 0, a number in [0, 1), a number."""
    if not isinstance(cyclic_times, int) or cyclic_times <= 0:
        raise ValueError(f"cyclic_times must be an int > 0, got {cyclic_times!r}")
    check_numbers(step_ratio_up=step_ratio_up, gamma=gamma)
    if not 0 <= step_ratio_up < 1:
        raise ValueError(f"step_ratio_up must be in [0, 1), a share of the cycle; got {step_ratio_up}")


def cycle_length(max_iters: int, cyclic_times: int) -> int:
    """Iterations of one cycle.

    Raises:
        ValueError: the run is too short for so many.
    """
    if max_iters < cyclic_times:
        raise ValueError(f"cyclic_times={cyclic_times}, but the run has only {max_iters} iterations")
    return max_iters // cyclic_times
