"""Config files -> dicts: parse, replace what stands for something else, merge over the bases.

Trust: a Python config is a program and is executed, with all the rights of the process. JSON and YAML are only data
(``yaml.safe_load``), unless their ``_base_`` leads to Python.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import sys
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

FORMATS = (".py", ".json", ".yaml", ".yml")
_PREDEFINED = re.compile(r"\{\{\s*(fileDirname|fileBasenameNoExtension|fileBasename|fileExtname)\s*\}\}")
_BASE_REFERENCE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
_PLACEHOLDER = "__base_reference_{}__"  # stands for a reference while the file is parsed
_module_numbers = itertools.count()


def alike(sequence: Any, items: Iterable[Any]) -> Any:
    """``items`` as the type of ``sequence``: a list, a tuple, or a namedtuple, which is made in its own way."""
    return sequence._make(items) if hasattr(sequence, "_make") else type(sequence)(items)


def read_file(path: str, use_predefined_variables: bool, children: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    if not os.path.isfile(path):
        wanted = f", a base of {children[-1]}" if children else ""
        raise FileNotFoundError(f"config file {path}{wanted}, does not exist")
    if not path.endswith(FORMATS):
        raise OSError(f"a config is one of {', '.join(FORMATS)}, got {path}")
    if path in children:
        raise ValueError(f"config file {path} inherits from itself: {' -> '.join((*children, path))}")
    with open(path, encoding="utf-8") as file:
        return read_text(file.read(), path, use_predefined_variables, children)


def read_text(
    text: str, path: str, use_predefined_variables: bool, children: tuple[str, ...]
) -> tuple[dict[str, Any], str]:
    """The dict that the text of the file at ``path`` stands for, bases merged in, and the text of all files."""
    source = _fill_predefined(text, path) if use_predefined_variables else text
    references: dict[str, str] = {}  # placeholder -> dotted key in the bases

    def stand_in(match: re.Match[str]) -> str:
        placeholder = _PLACEHOLDER.format(len(references))
        references[placeholder] = match[1]
        return f'"{placeholder}"'

    source = _BASE_REFERENCE.sub(stand_in, source)
    own = _parse_python(source, path) if path.endswith(".py") else _parse_data(source, path)
    _warn_if_deprecated(own.pop("_deprecation_", None), path)

    names = own.pop("_base_", [])
    names = [names] if isinstance(names, str) else names
    bases: dict[str, Any] = {}
    texts = []
    for name in names:
        base_path = os.path.normpath(os.path.join(os.path.dirname(path), name))
        base, base_text = read_file(base_path, use_predefined_variables, (*children, path))
        if shared := sorted(bases.keys() & base.keys()):
            raise KeyError(f"bases of {path} share the keys {shared}; only one of them may have a key ({name} is one)")
        bases.update(base)
        texts.append(base_text)
    own = _resolve_references(own, references, bases, path)
    return merge(own, bases, allow_list_keys=False), "\n".join([*texts, f"{path}\n{text}"])


def _fill_predefined(text: str, path: str) -> str:
    folder, name = os.path.split(path)
    stem, extension = os.path.splitext(name)
    values = dict(fileDirname=folder, fileBasename=name, fileBasenameNoExtension=stem, fileExtname=extension)
    return _PREDEFINED.sub(lambda match: values[match[1]].replace("\\", "/"), text)


def _parse_python(source: str, path: str) -> dict[str, Any]:
    """Execute the file as a module of its own; its names are the config, without modules, functions and dunders."""
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        message = f"There are syntax errors in config file {path}, line {error.lineno}: {error.msg}"
        raise SyntaxError(message, (path, error.lineno, error.offset, error.text)) from error
    module = types.ModuleType(f"_fastrunner_config_{next(_module_numbers)}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    try:
        exec(code, module.__dict__)
    finally:
        del sys.modules[module.__name__]
    dropped = (types.ModuleType, types.FunctionType)
    return {
        name: value
        for name, value in vars(module).items()
        if not (isinstance(name, str) and name.startswith("__")) and not isinstance(value, dropped)
    }


def _parse_data(source: str, path: str) -> dict[str, Any]:
    if path.endswith(".json"):
        try:
            data = json.loads(source)
        except json.JSONDecodeError as error:
            raise ValueError(f"config file {path}, line {error.lineno}: {error.msg}") from error
    else:
        import yaml

        try:
            data = yaml.safe_load(source) or {}
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"config file {path}{line}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"config file {path} must hold a mapping, not a {type(data).__name__}")
    return data


def _warn_if_deprecated(notice: Mapping[str, str] | None, path: str) -> None:
    if notice is None:
        return
    message = f"The config file {path} will be deprecated in the future."
    if "expected" in notice:
        message += f" Please use {notice['expected']} instead."
    if "reference" in notice:
        message += f" More information can be found at {notice['reference']}"
    warnings.warn(message, DeprecationWarning, stacklevel=5)  # the caller of Config.fromfile


def _resolve_references(value: Any, references: Mapping[str, str], bases: Mapping[str, Any], path: str) -> Any:
    """Put what the bases hold where the placeholders stand."""
    if not references:
        return value
    if isinstance(value, dict):
        return {k: _resolve_references(v, references, bases, path) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return alike(value, (_resolve_references(v, references, bases, path) for v in value))
    if not isinstance(value, str):
        return value
    if value in references:
        found: Any = bases
        for key in references[value].split("."):
            if not isinstance(found, dict) or key not in found:
                raise KeyError(f"config file {path}: {{{{ _base_.{references[value]} }}}} is not in its bases")
            found = found[key]
        return copy.deepcopy(found)
    for placeholder, dotted in references.items():
        if placeholder in value:
            raise ValueError(
                f"config file {path}: {{{{ _base_.{dotted} }}}} must be a value by itself, not a part of a string"
            )
    return value


# ---------------------------------------------------------------- merging


def merge(child: Mapping[str, Any], base: Any, allow_list_keys: bool, kind: type[dict[str, Any]] = dict) -> Any:
    """``base`` (a dict or, with ``allow_list_keys``, a list) with ``child`` over it; neither is changed.

    Dicts that are new in ``base`` are made into ``kind``.
    """
    merged = base.copy()
    for key, value in child.items():
        place: Any = key
        if isinstance(base, list):
            place = _list_index(key, base)
        elif key == "_delete_":
            continue
        present = isinstance(base, list) or key in base
        if not isinstance(value, dict):
            merged[place] = value
        elif not present or value.get("_delete_", False):
            merged[place] = kind(without_delete(value))
        elif isinstance(base[place], (dict, list) if allow_list_keys else dict):
            merged[place] = merge(value, base[place], allow_list_keys, kind)
        else:
            raise TypeError(
                f"{key}={value} in child config cannot inherit from base because {key} is a dict in the child config "
                f"but is of type {type(base[place])} in base config. "
                "You may set `_delete_=True` to ignore the base config."
            )
    return merged


def _list_index(key: str, items: list[Any]) -> int:
    if not str(key).isdigit():
        raise TypeError(f"{key!r} is not an index, but it is to go into the list {items}")
    if int(key) >= len(items):
        raise KeyError(f"Index {key} exceeds the length of list {items}")
    return int(key)


def without_delete(value: Any) -> Any:
    """``value`` without any ``_delete_``: the word has acted, and nothing that is built knows it."""
    if isinstance(value, dict):
        return {k: without_delete(v) for k, v in value.items() if k != "_delete_"}
    if isinstance(value, (list, tuple)):
        return alike(value, map(without_delete, value))
    return value
