"""Unknown names in configs are errors, and say what may have been meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that ``name`` may be a misspelling of, best first; case does not matter."""
    spelled = {each.lower(): each for each in known}  # cosineannealing... is a misspelling of CosineAnnealing...
    return [spelled[each] for each in difflib.get_close_matches(name.lower(), spelled, n=count)]


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` almost surely was to be: a letter or two differ. None for a name that is known."""
    names = list(known)
    close = [] if name in names else difflib.get_close_matches(name, names, n=1, cutoff=0.85)
    return close[0] if close else None


def unknown_keys(given: Iterable[str], known: Iterable[str]) -> str:
    """The end of a message about keys that nobody knows, or nothing: the nearest for one of them, else all that are
    known."""
    names = list(known)
    unknown = [key for key in given if key not in names]
    for key in unknown:
        if close := nearest(key, names):
            return f"; did you mean {close[0]} instead of {key}?"
    return f"; it knows {', '.join(names)}" if unknown and names else ""


def check_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise KeyError if ``what`` was given keys that are not known."""
    keys, names = list(given), list(known)
    if unknown := [key for key in keys if key not in names]:
        raise KeyError(f"{what} has no {', '.join(map(str, unknown))}{unknown_keys(unknown, names)}")


def parameters(target: Callable[..., Any]) -> list[str]:
    """What can be given to a function or a class by name; a class may hand its ``**kwargs`` on to its bases."""
    known: dict[str, None] = {}
    for each in target.__mro__ if inspect.isclass(target) else [target]:
        function = vars(each).get("__init__") if inspect.isclass(each) else each
        if inspect.isroutine(function) and not isinstance(function, type(object.__init__)):
            kinds = inspect.signature(function).parameters.values()
            known.update({p.name: None for p in kinds if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)})
    known.pop("self", None)
    return list(known)


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether it has ``**kwargs``, or does not say what it takes (a mock)."""
    if not inspect.isroutine(function):
        return True
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


__all__ = ["check_keys", "misspelt", "nearest", "parameters", "takes_any", "unknown_keys"]
