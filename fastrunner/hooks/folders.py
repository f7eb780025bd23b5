"""Where hooks write: the work_dir, or a folder of the run inside another one. Local disks only."""

from __future__ import annotations

import os
import re
import shutil
import string
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


def check_local(out_dir: Any, file_client_args: dict[str, Any] | None) -> None:
    """Refuse what MMCV would send to a remote store.

    Raises:
        TypeError: ``out_dir`` is no str.
        ValueError: another backend than "disk", or an ``out_dir`` like ``s3://...``.
    """
    if out_dir is not None and not isinstance(out_dir, (str, os.PathLike)):
        raise TypeError(f"out_dir must be a str or None, got {type(out_dir).__name__}")
    backend = (file_client_args or {}).get("backend", "disk")
    if backend != "disk" or (out_dir is not None and "://" in os.fspath(out_dir)):
        raise ValueError(
            f"files go to local folders only, got out_dir={out_dir!r}, file_client_args={file_client_args!r}; "
            "mount the store, or copy the files in a hook of your own"
        )


def run_folder(runner: BaseRunner, out_dir: str | None) -> str:
    """The work_dir, or ``<out_dir>/<name of the work_dir>`` where another folder is given."""
    if not out_dir or out_dir == runner.work_dir:
        return runner.work_dir
    return os.path.join(out_dir, os.path.basename(runner.work_dir.rstrip(os.sep)))


def numbered(folder: str, name_of: str) -> dict[int, str]:
    """number -> path of the files in ``folder`` that are called ``name_of.format(number)``; none without one ``{}``."""
    parts = list(string.Formatter().parse(name_of))
    if sum(field is not None for _, field, _, _ in parts) != 1:
        return {}
    pattern = "".join(re.escape(text) + (r"(\d+)" if field is not None else "") for text, field, _, _ in parts)
    found = {}
    for entry in os.scandir(folder):
        match = re.fullmatch(pattern, entry.name)
        if match and entry.is_file() and name_of.format(int(match[1])) == entry.name:
            found[int(match[1])] = entry.path
    return found


def files_ending(folder: str, ends: str | tuple[str, ...]) -> list[str]:
    """Paths of the files below ``folder`` whose names end so, sorted; hidden files and folders are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if name.endswith(ends) and not name.startswith(".")]
    return sorted(found)


def copy_out(runner: BaseRunner, out_dir: str, ends: str | tuple[str, ...], keep_local: bool) -> None:
    """Copy the files of the work_dir that end so to ``out_dir``, or move them, with their places below it."""
    inside = os.path.abspath(out_dir) + os.sep
    for path in files_ending(runner.work_dir, ends):
        if os.path.abspath(path).startswith(inside):
            continue  # out_dir is below the work_dir
        target = os.path.join(out_dir, os.path.relpath(path, runner.work_dir))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(path, target)
        runner.logger.info(f"The file {path} has been uploaded to {target}.")
        if not keep_local:
            os.remove(path)
            runner.logger.info(f"{path} was removed due to the `self.keep_local=False`")
