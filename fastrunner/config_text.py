"""Configs as text: Python source that gives the same values when it is executed, and plain data for JSON and YAML.

Deterministic: one config gives one text, on any machine (sets are written in the order of their elements' text).
"""

from __future__ import annotations

import builtins
import enum
import keyword
import math
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any

__all__ = ["format_config", "plain"]

_WIDTH = 80
_INDENT = "    "
_USED_BUILTINS = frozenset({"__import__", "complex", "dict", "float", "frozenset", "globals", "range", "set"})


def format_config(cfg: Mapping[str, Any]) -> str:
    """One assignment a key. Reading the text as a config gives values equal to those of ``cfg``.

    Raises:
        TypeError: a value has no form in Python source (an array, an object); its place in the config is named.
    """
    shadowed = not _USED_BUILTINS.isdisjoint(cfg)  # a key called dict, say: dict(...) would call the value
    writer = _Writer("__builtins." if shadowed else "")
    lines = ["import builtins as __builtins"] if shadowed else []
    for key, value in cfg.items():
        target = key if _is_name(key) else f"{writer.prefix}globals()[{key!r}]"
        lines.append(f"{target} = {writer.layout(value, str(key), '', len(target) + 3)}")
    return "".join(f"{line}\n" for line in lines)


class _Writer:
    """Values -> source. ``prefix`` goes before the names of builtins; ``place`` is the path of a value, for errors."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def layout(self, value: Any, place: str, indent: str, used: int) -> str:
        """On one line where it fits into what ``used`` columns leave of it, else one item a line."""
        flat = self.flat(value, place)
        parts = self._parts(value, place)
        if parts is None or not parts[1] or used + len(flat) <= _WIDTH:
            return flat
        opening, items, closing = parts
        inner = indent + _INDENT
        lines = [
            f"{inner}{name}{self.layout(item, item_place, inner, len(inner) + len(name) + 1)},\n"
            for name, item, item_place in items
        ]
        return f"{opening}\n{''.join(lines)}{indent}{closing}"

    def flat(self, value: Any, place: str) -> str:
        parts = self._parts(value, place)
        if parts is None:
            return self._atom(value, place)
        opening, items, closing = parts
        body = ", ".join(f"{name}{self.flat(item, item_place)}" for name, item, item_place in items)
        comma = "," if isinstance(value, tuple) and len(items) == 1 else ""
        return f"{opening}{body}{comma}{closing}"

    def _parts(self, value: Any, place: str) -> tuple[str, list[tuple[str, Any, str]], str] | None:
        """Opening, (name, item, place of the item)..., closing; None for what holds no items."""
        if isinstance(value, dict):
            places = {key: f"{place}.{key}" for key in value}
            if all(_is_name(key) for key in value):
                return f"{self.prefix}dict(", [(f"{k}=", v, places[k]) for k, v in value.items()], ")"
            return "{", [(f"{self.flat(k, place)}: ", v, places[k]) for k, v in value.items()], "}"
        if isinstance(value, (list, tuple)):
            opening, closing = "[]" if isinstance(value, list) else "()"
            return opening, [("", item, f"{place}.{i}") for i, item in enumerate(value)], closing
        if isinstance(value, (set, frozenset)) and value:
            items = sorted(value, key=lambda item: self.flat(item, place))
            opening, closing = ("{", "}") if isinstance(value, set) else (f"{self.prefix}frozenset({{", "})")
            return opening, [("", item, place) for item in items], closing
        return None

    def _atom(self, value: Any, place: str) -> str:
        value = _python_scalar(value)
        if value is None or value is ... or isinstance(value, (bool, types.EllipsisType)):
            return repr(value)
        if isinstance(value, enum.Enum):
            return f"{self._reference(type(value), place)}[{value.name!r}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.prefix}float('{float(value)}')"
        if isinstance(value, complex):
            return f"{self.prefix}complex({self._atom(value.real, place)}, {self._atom(value.imag, place)})"
        for kind in (int, float, str, bytes):
            if isinstance(value, kind):
                return kind.__repr__(value)  # of the plain kind, whatever a subclass prints
        if isinstance(value, range):
            return f"{self.prefix}range({value.start}, {value.stop}, {value.step})"
        if isinstance(value, (set, frozenset)):
            return f"{self.prefix}{type(value).__name__}()"
        if isinstance(value, pathlib.PurePath):
            return f"{self.prefix}__import__('pathlib').{type(value).__name__}({str(value)!r})"
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return self._reference(value, place)
        raise _unwritable(value, place, "Python")

    def _reference(self, value: Any, place: str) -> str:
        """Source that finds a class or function where it was defined."""
        module, name = value.__module__, value.__qualname__
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not value:  # made inside a function, or in a config file
            raise _unwritable(value, place, "Python")
        if value is getattr(builtins, name, None):
            return f"{self.prefix}{name}"
        return f"{self.prefix}__import__({module!r}, fromlist=[{name!r}]).{name}"


def plain(value: Any, place: str = "config") -> Any:
    """``value`` in the types of JSON: tuples, sets, ranges and arrays become lists, paths strings.

    Raises:
        TypeError: a value has no such form; its place in the config is named.
    """
    value = _python_scalar(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return {plain(k, place): plain(v, f"{place}.{k}") for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple, range)):
        return [plain(item, f"{place}.{i}") for i, item in enumerate(value)]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if hasattr(value, "tolist"):  # an array or a tensor
        return value.tolist()
    raise _unwritable(value, place, "JSON or YAML")


def _python_scalar(value: Any) -> Any:
    """A numpy scalar as Python's; anything else as it is. numpy is not imported for this."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def _is_name(key: object) -> bool:
    """Whether Python reads the text of ``key`` back as the same name: it normalises letters outside ASCII."""
    return isinstance(key, str) and key.isascii() and key.isidentifier() and not keyword.iskeyword(key)


def _unwritable(value: object, place: str, language: str) -> TypeError:
    return TypeError(
        f"{place}: a {type(value).__name__} cannot be written as {language}; "
        f"name it by its string or its plain values instead of {value!r}"
    )
