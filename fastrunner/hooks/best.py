"""The best checkpoint so far: which of two scores is better, and the one file that is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

COMPARE: dict[str, Callable[[Any, Any], bool]] = {"greater": lambda x, y: x > y, "less": lambda x, y: x < y}
WORST = {"greater": float("-inf"), "less": float("inf")}


def find_rule(rule: str | None, key: str, greater_keys: Sequence[str], less_keys: Sequence[str]) -> str:
    """ "greater" or "less", by ``rule``, else by the name of the score: equal to a key, else holding one; any case.

    Raises:
        KeyError: another ``rule``.
        ValueError: no key tells.
    """
    if rule is not None:
        if rule not in COMPARE:
            raise KeyError(f'rule must be "greater", "less" or None, got {rule!r}')
        return rule
    name = key.lower()
    greater, less = [k.lower() for k in greater_keys], [k.lower() for k in less_keys]
    for found, answer in (
        (name in greater, "greater"),
        (name in less, "less"),
        (any(k in name for k in greater), "greater"),
        (any(k in name for k in less), "less"),
    ):
        if found:
            return answer
    raise ValueError(
        f"nothing says whether more or less of {key!r} is better: give rule, or a key of its name in greater_keys "
        "or less_keys"
    )


def keys_of(name: str, keys: Any, default: Sequence[str]) -> Sequence[str]:
    """``keys``, checked: None, a str, or a list or tuple of them."""
    if keys is None:
        return default
    keys = (keys,) if isinstance(keys, str) else keys
    if not isinstance(keys, (list, tuple)) or not all(isinstance(key, str) for key in keys):
        raise TypeError(f"{name} must be a list of str, got {keys!r}")
    return keys


def plain_score(score: Any) -> Any:
    """A Python float where the score is a number of another kind; it goes into checkpoints."""
    return float(score) if hasattr(score, "__float__") and not isinstance(score, (int, float)) else score


def remove_file(path: str | None, runner: BaseRunner) -> None:
    if path and os.path.isfile(path):
        os.remove(path)
        runner.logger.info(f"The previous best checkpoint {path} was removed")
