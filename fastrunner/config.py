"""Config files: Python, JSON or YAML -> dicts with attribute access.

A file may inherit (``_base_``), replace instead of merge (``_delete_=True``), speak of itself (``{{ fileDirname }}``),
of what it inherits (``{{ _base_.model.depth }}``), and name modules to import (``custom_imports``).

Trust: a Python config is a program and is executed when it is read, with all the rights of the process. JSON and YAML
are only data here (``yaml.safe_load``), unless their ``_base_`` or ``custom_imports`` leads to Python.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import types
import warnings
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrunner.config_files import FORMATS, alike, merge, read_file, read_text, without_delete
from fastrunner.config_text import format_config, plain

__all__ = ["Config", "ConfigDict", "DictAction", "import_modules_from_strings"]

_RESERVED_KEYS = ("filename", "text", "pretty_text")


class ConfigDict(dict[str, Any]):
    """A dict whose keys are attributes too: ``cfg.model.depth`` is ``cfg["model"]["depth"]``.

    Dicts inside what it is made from, lists and tuples included, become ConfigDicts. What is assigned later is kept as
    it is, as in MMCV. A missing attribute is an AttributeError, a missing key a KeyError.
    """

    def __init__(self, *args: Mapping[str, Any] | Iterable[tuple[str, Any]] | None, **kwargs: Any) -> None:
        super().__init__()
        for source in (*args, kwargs):
            for key, value in dict(source or {}).items():
                self[key] = self._convert(value)

    @classmethod
    def _convert(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return cls(value)
        if isinstance(value, (list, tuple)):
            return alike(value, map(cls._convert, value))
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=self) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(
                f"{name!r} is a method of {type(self).__name__}; write cfg[{name!r}] = ... for the key"
            )
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(key for key in self if isinstance(key, str))]

    def copy(self) -> ConfigDict:
        """A shallow copy: the values are shared."""
        new = type(self)()
        dict.update(new, self)
        return new

    def deepcopy(self) -> ConfigDict:
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts all the way down, inside lists and tuples too."""
        return {key: _undo(value) for key, value in self.items()}

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As ``dict.update``, but where both sides hold a dict, the two are merged."""
        for key, value in dict(*args, **kwargs).items():
            mine = self.get(key)
            if isinstance(mine, dict) and isinstance(value, dict):
                mine.update(value)
            else:
                self[key] = value

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, dict):
            return NotImplemented
        new = type(self)(self)
        new.update(other)
        return new

    def __ror__(self, other: Any) -> Any:
        return type(self)(other) | self if isinstance(other, dict) else NotImplemented

    def __ior__(self, other: Any) -> ConfigDict:  # type: ignore[override]  # dict's overloads cannot merge
        self.update(other)
        return self


def _undo(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _undo(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return alike(value, map(_undo, value))
    return value


class Config:
    """A config and where it came from. Unknown attributes are the ConfigDict's: ``cfg.model``, ``cfg.get(...)``.

    Args:
        cfg_dict: the config; copied into a ConfigDict.
        cfg_text: ``cfg.text``; by default the content of ``filename``, if one is given.
        filename: ``cfg.filename``.
    Raises:
        TypeError: ``cfg_dict`` is not a dict.
        KeyError: a key of it is reserved (filename, text, pretty_text).
    """

    _cfg_dict: ConfigDict
    _filename: str | None
    _text: str

    def __init__(
        self,
        cfg_dict: dict[str, Any] | None = None,
        cfg_text: str | None = None,
        filename: str | os.PathLike[str] | None = None,
    ) -> None:
        if cfg_dict is not None and not isinstance(cfg_dict, dict):
            raise TypeError(f"cfg_dict must be a dict, got {type(cfg_dict).__name__}: {cfg_dict!r}")
        for key in _RESERVED_KEYS:
            if cfg_dict and key in cfg_dict:
                raise KeyError(f"{key} is reserved for the config file itself; rename the key")
        if not cfg_text:
            cfg_text = Path(filename).read_text(encoding="utf-8") if filename else ""
        self.__setstate__((ConfigDict(cfg_dict), None if filename is None else os.fspath(filename), cfg_text))

    @staticmethod
    def fromfile(
        filename: str | os.PathLike[str], use_predefined_variables: bool = True, import_custom_modules: bool = True
    ) -> Config:
        """Read a config file and everything it inherits from. A Python file is executed.

        Args:
            filename: ends in .py, .json, .yaml or .yml.
            use_predefined_variables: replace ``{{ fileDirname }}`` and its like, in inherited files too.
            import_custom_modules: import what ``custom_imports=dict(imports=[...])`` names.
        Raises:
            FileNotFoundError, OSError: no such file; not one of the formats.
            SyntaxError, ValueError: the file (Python; JSON or YAML) does not parse; file and line are named.
            KeyError: two bases share a key, or a base reference leads nowhere.
            TypeError: a dict is to be merged into something else.
        """
        path = os.path.abspath(os.path.expanduser(filename))
        cfg_dict, text = read_file(path, use_predefined_variables, children=())
        return _finish(cfg_dict, text, os.fspath(filename), import_custom_modules)

    @staticmethod
    def fromstring(cfg_str: str, file_format: str) -> Config:
        """As ``fromfile``, from the text of a file. Relative bases are looked for in the current directory."""
        if file_format not in FORMATS:
            raise OSError(f"a config is one of {', '.join(FORMATS)}, got {file_format!r}")
        if file_format != ".py" and "dict(" in cfg_str:
            warnings.warn(f"the text has 'dict(' in it; is it Python rather than {file_format}?", stacklevel=2)
        path = os.path.abspath(f"<string>{file_format}")  # dump() goes by the extension
        cfg_dict, text = read_text(cfg_str, path, use_predefined_variables=True, children=())
        return _finish(cfg_dict, text, path, import_custom_modules=True)

    @property
    def filename(self) -> str | None:
        return self._filename

    @property
    def text(self) -> str:
        """Each file's absolute path and content, bases first."""
        return self._text

    @property
    def pretty_text(self) -> str:
        """Python source that gives the same config when it is read; the same text for the same config."""
        return format_config(self._cfg_dict)

    def dump(self, file: str | os.PathLike[str] | None = None) -> str | None:
        """Write the config to ``file``, in the format of its extension, or return the text.

        Without a file the format is that of ``filename``, else Python. JSON and YAML have no tuples: they become lists.

        Raises:
            OSError: the extension is none of the formats.
            TypeError: a value has no form in the format; its place is named.
        """
        file_format = os.path.splitext(file or self._filename or ".py")[1] or ".py"
        if file is not None and file_format not in FORMATS:
            raise OSError(f"a config is one of {', '.join(FORMATS)}, got {os.fspath(file)!r}")
        text = self._as(file_format)
        if file is None:
            return text
        Path(file).write_text(text, encoding="utf-8")
        return None

    def _as(self, file_format: str) -> str:
        if file_format == ".json":
            return json.dumps(plain(self._cfg_dict), indent=2) + "\n"
        if file_format in (".yaml", ".yml"):
            import yaml  # slow to import, and Python configs do not need it

            return str(yaml.safe_dump(plain(self._cfg_dict), sort_keys=False))
        return self.pretty_text

    def merge_from_dict(self, options: Mapping[str, Any], allow_list_keys: bool = True) -> None:
        """Merge ``{"model.backbone.depth": 50, "pipeline.0.type": "Load"}`` into the config.

        Args:
            options: dotted keys; ``dict(_delete_=True, ...)`` replaces instead of merging.
            allow_list_keys: an integer key of a list is an index.
        Raises:
            KeyError: an index is past the end of its list.
            TypeError: a dict is to be merged into something that is neither dict nor list.
        """
        nested = ConfigDict()
        for full_key, value in options.items():
            *parents, last = full_key.split(".")
            level: dict[str, Any] = nested
            for key in parents:
                level = level.setdefault(key, ConfigDict())
                if not isinstance(level, dict):
                    raise TypeError(f"{full_key!r} goes into {key!r}, which another option sets to {level!r}")
            level[last] = value
        merged = merge(nested, self._cfg_dict, allow_list_keys, kind=ConfigDict)
        object.__setattr__(self, "_cfg_dict", merged)

    def __repr__(self) -> str:
        return f"Config (path: {self._filename}): {self._cfg_dict!r}"

    def __len__(self) -> int:
        return len(self._cfg_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cfg_dict)

    def __contains__(self, key: object) -> bool:
        return key in self._cfg_dict

    def __getattr__(self, name: str) -> Any:
        if name == "_cfg_dict":  # asked by copy and pickle before there is a state
            raise AttributeError(name)
        return getattr(self._cfg_dict, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cfg_dict, name, ConfigDict(value) if isinstance(value, dict) else value)

    def __delattr__(self, name: str) -> None:
        delattr(self._cfg_dict, name)

    def __getitem__(self, key: str) -> Any:
        return self._cfg_dict[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._cfg_dict[key] = ConfigDict(value) if isinstance(value, dict) else value

    def __delitem__(self, key: str) -> None:
        del self._cfg_dict[key]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._cfg_dict]

    def __getstate__(self) -> tuple[ConfigDict, str | None, str]:
        return (self._cfg_dict, self._filename, self._text)

    def __setstate__(self, state: tuple[ConfigDict, str | None, str]) -> None:
        for name, value in zip(("_cfg_dict", "_filename", "_text"), state, strict=True):
            object.__setattr__(self, name, value)


def _finish(cfg_dict: dict[str, Any], text: str, filename: str, import_custom_modules: bool) -> Config:
    cfg = Config(without_delete(cfg_dict), cfg_text=text, filename=filename)
    if import_custom_modules and cfg.get("custom_imports"):
        import_modules_from_strings(**cfg.custom_imports)
    return cfg


# ---------------------------------------------------------------- imports and the command line


def import_modules_from_strings(imports: str | list[str] | None, allow_failed_imports: bool = False) -> Any:
    """Import the modules named: one (returned) or a list (a list is returned).

    Raises:
        TypeError: neither a str nor a list of str.
        ImportError: a module does not import, the module named and the error chained; with ``allow_failed_imports`` a
            UserWarning, and None in its place.
    """
    if not imports:
        return None
    names = [imports] if isinstance(imports, str) else imports
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"imports of custom_imports must be a str or a list of str, got {imports!r}")
    modules: list[types.ModuleType | None] = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            if not allow_failed_imports:
                raise ImportError(f"custom_imports: {name} does not import: {error}", name=name) from error
            warnings.warn(f"custom_imports: {name} failed to import and is ignored: {error}", UserWarning, stacklevel=2)
            modules.append(None)
    return modules[0] if isinstance(imports, str) else modules


class DictAction(Action):
    """argparse action for ``--cfg-options KEY=VALUE KEY=VALUE ...``.

    A value is an int, a float, true or false (any case), None, or else a str. ``a,b`` and ``[a,b]`` are lists,
    ``(a,b)`` a tuple, and they nest. Quotes around a value and all spaces are dropped.
    """

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Set ``dest`` to the dict of options. ValueError: no ``=``, or brackets that do not match."""
        options: dict[str, Any] = {}
        for item in [values] if isinstance(values, str) else values or []:
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"{option_string or self.dest} takes KEY=VALUE, got {item!r}")
            options[key] = self._parse_iterable(value)
        setattr(namespace, self.dest, options)

    @staticmethod
    def _parse_int_float_bool(value: str) -> Any:
        for convert in (int, float):
            try:
                return convert(value)
            except ValueError:
                continue  # not of this type; the last resort is the str itself
        words = {"true": True, "false": False}
        return None if value == "None" else words.get(value.lower(), value)

    @staticmethod
    def _parse_iterable(value: str) -> Any:
        value = value.strip("'\"").replace(" ", "")
        ends = value[:1] + value[-1:]
        if ends in ("()", "[]") and len(_split_at_commas(value)) == 1:
            items = [DictAction._parse_iterable(part) for part in _split_at_commas(value[1:-1])]
            return tuple(items) if ends == "()" else items
        if "," not in value:
            return DictAction._parse_int_float_bool(value)
        parts = _split_at_commas(value)
        if parts == [value]:  # brackets behind a word: dict(a=1,b=2)
            raise ValueError(f"{value} is no number, text, list or tuple; set the keys of a dict one by one: key.a=1")
        return [DictAction._parse_iterable(part) for part in parts]


def _split_at_commas(text: str) -> list[str]:
    """Split at the commas that are in no brackets; a comma at the end adds nothing."""
    parts, closing = [""], list[str]()
    for char in text:
        if char == "," and not closing:
            parts.append("")
            continue
        if char in "([":
            closing.append(")" if char == "(" else "]")
        elif char in ")]" and (not closing or closing.pop() != char):
            raise ValueError(f"Imbalanced brackets exist in {text}")
        parts[-1] += char
    if closing:
        raise ValueError(f"Imbalanced brackets exist in {text}")
    return parts if parts[-1] else parts[:-1]
