"""Checkpoint files on disk: written whole or not at all, read safely."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import PosixPath, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size))

# What MMCV's meta holds beside plain types: scores that a metric left as numpy's, ranges in configs, paths. Made from
# their parts, none of them can run code; arrays of objects are not among them. numpy 1 had another name for its module.
_NUMPY: Any = getattr(np, "_core", None) or vars(np)["core"]
_SAFE: list[Any] = [
    np.ndarray,
    np.dtype,
    *[
        (getattr(_NUMPY.multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("_core", "core")
    ],
    *[type(np.dtype(code)) for code in "?bhilqBHILQefdgFDSUMm"],
    complex,
    frozenset,
    range,
    PosixPath,
]

_REFUSED = re.compile(
    r"[Uu]nsupported (?:global: )?GLOBAL \S+|Can only (?:build|create|append|extend) .*"
)  # torch's words


def write(checkpoint: dict[str, Any], path: str) -> None:
    """Save so that ``path`` always holds a whole file: temporary file beside it, flush to disk, rename.

    Raises:
        OSError: the disk is full or the folder cannot be written; what stood at ``path`` before is untouched.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _sync_folder(folder)  # without it, a power cut can lose the rename


def link_latest(out_dir: str, filename: str) -> None:
    """Point ``<out_dir>/latest.pth`` at ``filename`` in the same folder, with no moment at which it points nowhere."""
    temporary = os.path.join(out_dir, f"latest.pth.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    os.symlink(filename, temporary)
    os.replace(temporary, os.path.join(out_dir, "latest.pth"))


def read(path: str, map_location: Any = None, *, trusted: bool = False) -> Any:
    """Load a checkpoint file; by default only tensors, plain types and numpy's, so that a file cannot run code.

    Args:
        trusted: allow any pickled object. Such a file can run code while it is read.
    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file is damaged, or holds objects that need ``trusted=True``, or code that is not installed.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a checkpoint file")
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location=map_location, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is None and not zipfile.is_zipfile(path):
            raise _damaged(path, error) from error
        what = refused[0] if refused else "an operation that is not allowed"
        raise RuntimeError(
            f"{path} holds more than tensors and plain types ({what}); "
            "if you trust where it comes from, load it with trusted=True"
        ) from error
    except (ImportError, AttributeError) as error:  # only with trusted: of a class that the file names
        raise RuntimeError(f"{path} holds objects of code that is not there: {error}") from error
    except (EOFError, KeyError, RuntimeError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> RuntimeError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return RuntimeError(f"{path} cannot be read ({said[0]}): it is damaged, or not a checkpoint")


def plain(value: Any, where: str = "meta") -> Any:
    """``value`` with subclasses and numpy scalars turned into what a safe load accepts.

    Dict subclasses become dicts, numpy scalars and arrays become numbers and lists, paths become strings. Anything else
    stays as it is, with a warning that names its place: the checkpoint is saved, but reading it takes ``trusted=True``.
    """
    if isinstance(value, Mapping):
        return {plain(k, where): plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, set)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, (tuple, range)):
        return tuple(plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return value.detach()  # a Parameter, or another subclass
    if isinstance(value, str):
        return str.__str__(value)  # an enum, torch.__version__
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    warnings.warn(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: reading this checkpoint back will take "
        "trusted=True; store numbers, strings, tensors, lists and dicts instead",
        stacklevel=2,
    )
    return value


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
