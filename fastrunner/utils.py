"""Small things that projects import from ``mmcv`` and ``mmcv.utils``, and nothing more."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = [
    "ProgressBar",
    "check_file_exist",
    "digit_version",
    "dump",
    "has_method",
    "is_list_of",
    "is_method_overridden",
    "is_seq_of",
    "is_str",
    "is_tuple_of",
    "load",
    "mkdir_or_exist",
    "obj_from_dict",
    "scandir",
    "symlink",
    "track_iter_progress",
]

_VERSION = re.compile(
    r"v?(?P<release>\d+(\.\d+)*)[._-]?((?P<pre>alpha|a|beta|b|rc|c)[._-]?(?P<pre_number>\d*))?"
    r"([._-]?post[._-]?(?P<post>\d+))?(?P<dev>[._-]?dev)?"
)

# ---------------------------------------------------------------- types


def is_str(x: object) -> bool:
    return isinstance(x, str)


def is_seq_of(seq: object, expected_type: Any, seq_type: type | None = None) -> bool:
    """Whether ``seq`` is a sequence (a ``seq_type``) all of whose items are of ``expected_type``."""
    if not isinstance(seq, Sequence if seq_type is None else seq_type):
        return False
    items: Any = seq
    return all(isinstance(item, expected_type) for item in items)


def is_list_of(seq: object, expected_type: Any) -> bool:
    return is_seq_of(seq, expected_type, list)


def is_tuple_of(seq: object, expected_type: Any) -> bool:
    return is_seq_of(seq, expected_type, tuple)


def has_method(obj: object, method: str) -> bool:
    return callable(getattr(obj, method, None))


def is_method_overridden(method: str, base_class: type, derived_class: Any) -> bool:
    """Whether ``derived_class``, a class or an object of one, has a ``method`` of its own.

    Raises:
        TypeError: ``base_class`` is not a class.
    """
    if not isinstance(base_class, type):
        raise TypeError(f"base_class must be a class, not an object of one: {base_class!r}")
    derived = derived_class if isinstance(derived_class, type) else type(derived_class)
    return getattr(derived, method) is not getattr(base_class, method)


def digit_version(version_str: str, length: int = 4) -> tuple[int, ...]:
    """``"1.13.0+cu117"`` -> ``(1, 13, 0, 0, 0, 0)``: versions that compare as they should, ``rc`` before the release.

    Raises:
        ValueError: not a version.
    """
    match = _VERSION.match(version_str)
    if match is None:
        raise ValueError(f"{version_str!r} is not a version")
    release = [int(number) for number in match["release"].split(".")]
    release = (release + [0] * length)[:length]
    if match["pre"]:
        return (*release, {"a": -3, "b": -2}.get(match["pre"][0], -1), int(match["pre_number"] or 0))
    if match["dev"]:
        return (*release, -4, 0)
    return (*release, 1, int(match["post"])) if match["post"] else (*release, 0, 0)


def obj_from_dict(info: dict[str, Any], parent: Any = None, default_args: dict[str, Any] | None = None) -> Any:
    """Call what ``info["type"]`` names with its other items.

    Args:
        info: ``type`` is a class, or the name of one in ``parent`` (None: of a loaded module).
        default_args: for the keys that ``info`` lacks.
    Raises:
        TypeError: wrong types.
        KeyError: no ``type``.
    """
    if not isinstance(info, dict) or not isinstance(default_args, dict | None):
        raise TypeError(f"info must be a dict, default_args a dict or None, got {info!r} and {default_args!r}")
    if "type" not in info:
        raise KeyError(f'info must have the key "type", got {info}')
    args = {**(default_args or {}), **info}
    kind = args.pop("type")
    if isinstance(kind, str):
        kind = sys.modules[kind] if parent is None else getattr(parent, kind)
    elif not isinstance(kind, type):
        raise TypeError(f"type must be a str or a class, got {type(kind).__name__}")
    return kind(**args)


# ---------------------------------------------------------------- files


def mkdir_or_exist(dir_name: str | os.PathLike[str], mode: int = 0o777) -> None:
    """Make a folder and its parents; ``~`` is expanded, an empty name is the current folder."""
    if os.fspath(dir_name):
        os.makedirs(os.path.expanduser(dir_name), mode=mode, exist_ok=True)


def symlink(src: str, dst: str, overwrite: bool = True, **kwargs: Any) -> None:
    """Make ``dst`` a link to ``src``, in place of what is there."""
    if overwrite and os.path.lexists(dst):
        os.remove(dst)
    os.symlink(src, dst, **kwargs)


def check_file_exist(filename: str, msg_tmpl: str = 'file "{}" does not exist') -> None:
    if not os.path.isfile(filename):
        raise FileNotFoundError(msg_tmpl.format(filename))


def scandir(
    dir_path: str | os.PathLike[str],
    suffix: str | tuple[str, ...] | None = None,
    recursive: bool = False,
    case_sensitive: bool = True,
) -> Iterator[str]:
    """Paths of the files in a folder, relative to it, without hidden ones."""
    endings = (suffix,) if isinstance(suffix, str) else suffix
    if endings is not None and not case_sensitive:
        endings = tuple(ending.lower() for ending in endings)
    root = os.fspath(dir_path)
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")] if recursive else []
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), root)
            known = path if case_sensitive else path.lower()
            if not name.startswith(".") and (endings is None or known.endswith(endings)):
                yield path


def load(file: str | os.PathLike[str], file_format: str | None = None) -> Any:
    """Read a .json, .yaml, .yml, .pkl or .pickle file. A pickle can run code while it is read.

    Raises:
        ValueError: another format.
    """
    kind = _format(file, file_format)
    if kind == "pkl":
        return pickle.loads(Path(file).read_bytes())
    text = Path(file).read_text(encoding="utf-8")
    if kind == "json":
        return json.loads(text)
    import yaml

    return yaml.safe_load(text)


def dump(obj: Any, file: str | os.PathLike[str] | None = None, file_format: str | None = None) -> str | bytes | None:
    """Write ``obj`` to a .json, .yaml, .yml, .pkl or .pickle file; without a file, return its text or bytes.

    JSON and YAML take plain values, sets, ranges, paths and numpy's numbers and arrays.

    Raises:
        ValueError: another format, or neither file nor format.
        TypeError: a value that the format cannot hold; its place is named.
    """
    kind = _format(file, file_format)
    data: str | bytes
    if kind == "pkl":
        data = pickle.dumps(obj, protocol=2)
    else:
        from .config_text import plain

        value = plain(obj, "value")
        if kind == "json":
            data = json.dumps(value)
        else:
            import yaml

            data = str(yaml.safe_dump(value, sort_keys=False))
    if file is None:
        return data
    mkdir_or_exist(os.path.dirname(os.fspath(file)))
    Path(file).write_bytes(data if isinstance(data, bytes) else data.encode())
    return None


def _format(file: str | os.PathLike[str] | None, file_format: str | None) -> str:
    if file is None and file_format is None:
        raise ValueError("without a file, file_format says what to write: json, yaml or pkl")
    name = file_format or os.path.splitext(os.fspath(file or ""))[1].lstrip(".")
    kind = {"json": "json", "yaml": "yaml", "yml": "yaml", "pkl": "pkl", "pickle": "pkl"}.get(name)
    if kind is None:
        raise ValueError(f"{name!r} is none of the formats json, yaml, yml, pkl, pickle")
    return kind


# ---------------------------------------------------------------- progress


class ProgressBar:
    """``[>>>>    ] 12/40, 8.1 task/s, elapsed: 1s, ETA: 3s``, redrawn at most ten times a second.

    Args:
        task_num: how many tasks there are; 0: unknown.
        bar_width: characters of the bar.
        start: start the clock now; else at ``start()``.
        file: where it is drawn; a line an update would flood a log file, so only a terminal and the end are served.
    """

    def __init__(self, task_num: int = 0, bar_width: int = 50, start: bool = True, file: IO[str] | None = None) -> None:
        self.task_num = task_num
        self.bar_width = bar_width
        self.completed = 0
        self.file = sys.stdout if file is None else file
        self._drawn = 0.0
        if start:
            self.start()

    def start(self) -> None:
        self._begun = time.perf_counter()

    def update(self, num_tasks: int = 1) -> None:
        """``num_tasks`` more are done."""
        self.completed += num_tasks
        now = time.perf_counter()
        done = self.task_num > 0 and self.completed >= self.task_num
        if done or (self.file.isatty() and now - self._drawn >= 0.1):
            self._drawn = now
            self.file.write(f"\r{self._line(now - self._begun)}" + ("\n" if done else ""))
            self.file.flush()

    def _line(self, elapsed_s: float) -> str:
        speed = self.completed / elapsed_s if elapsed_s > 0 else float("inf")
        if self.task_num <= 0:
            return f"completed: {self.completed}, elapsed: {elapsed_s:.0f}s, {speed:.1f} tasks/s"
        share = min(self.completed / self.task_num, 1.0)
        bar = (">" * int(self.bar_width * share)).ljust(self.bar_width)
        eta_s = max(self.task_num - self.completed, 0) / speed
        return (
            f"[{bar}] {self.completed}/{self.task_num}, {speed:.1f} task/s, "
            f"elapsed: {elapsed_s:.0f}s, ETA: {eta_s:5.0f}s"
        )


def track_iter_progress(tasks: Any, bar_width: int = 50, file: IO[str] | None = None) -> Iterator[Any]:
    """Iterate over ``tasks``, a sized iterable or a pair (iterable, count), with a progress bar."""
    items: Iterable[Any] = tasks
    if isinstance(tasks, tuple) and len(tasks) == 2 and isinstance(tasks[1], int):
        items, count = tasks
    else:
        count = len(tasks)
    bar = ProgressBar(count, bar_width, file=file)
    for item in items:
        yield item
        bar.update()
