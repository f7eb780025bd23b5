"""Hook priorities: hooks with lower numbers run first; ties run in the order of registration."""

from __future__ import annotations

from enum import Enum


class Priority(Enum):
    """Named priorities, as in MMCV."""

    HIGHEST = 0
    VERY_HIGH = 10
    HIGH = 30
    ABOVE_NORMAL = 40
    NORMAL = 50
    BELOW_NORMAL = 60
    LOW = 70
    VERY_LOW = 90
    LOWEST = 100


def get_priority(priority: int | str | Priority) -> int:
    """The number behind a priority: an int in 0..100, a name in any case, or a :class:`Priority`.

    Raises:
        ValueError: an int outside 0..100.
        KeyError: an unknown name.
        TypeError: any other type.
    """
    if isinstance(priority, int):
        if not 0 <= priority <= 100:
            raise ValueError(f"priority must be between 0 and 100, got {priority}")
        return priority
    if isinstance(priority, Priority):
        return priority.value
    if isinstance(priority, str):
        try:
            return Priority[priority.upper()].value
        except KeyError:
            raise KeyError(f"unknown priority {priority!r}; known: {', '.join(Priority.__members__)}") from None
    raise TypeError(f"priority must be an int, a name or a Priority, got {type(priority).__name__}")
