"""Compiled steps on disk: which one a graph needs, and whether a file is the one that was put there.

    <folder>/<key>-<sha256 of key and contents>.so

The key says for what it was compiled: the graph, the processor, the number of threads, the versions. A file is looked
at whole before it is loaded: half a library ends the process. Files appear under their names whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .. import __version__
from ..data.builtin import cache_dir
from .torch_private import AHEAD

MAX_FILES = 128  # of 0.3 to 3 MB each; those that were not used for longest go


def folder() -> Path:
    """``$FASTRUNNER_CACHE/aot``, else ``~/.cache/fastrunner/aot``; where others may write, nothing is loaded from."""
    return cache_dir() / "aot"


def key_of(graph: GraphModule, args: Sequence[Tensor]) -> str:
    """What a compiled graph is made for, as 32 hexadecimal digits.

    Args:
        args: example inputs.
    """
    parts: list[Any] = [machine(), settings(), sorted(AHEAD.items()), torch.__version__, __version__]
    parts += [(tuple(a.shape), a.stride(), a.dtype, a.device) for a in args]
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        like = (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else None
        parts.append((node.op, node.name, str(node.target), str(node.args), str(node.kwargs), str(like)))
        if node.op == "get_attr":
            parts.append(getattr(graph, str(node.target)).tolist())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def settings() -> dict[str, Any]:
    """Of this process: what compiled code depends on, and the compiling process takes over."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.get_deterministic_debug_mode(),
    }


def apply_settings(given: dict[str, Any]) -> None:
    torch.set_num_threads(given["threads"])
    torch.set_default_dtype(given["dtype"])
    torch.set_deterministic_debug_mode(given["deterministic"])


def find(key: str) -> Path | None:
    """The library of a key; None: there is none that can be trusted. Damaged ones are removed."""
    try:
        if not _is_ours(folder()):
            return None
        for path in folder().glob(f"{key}-*.so"):
            if path.name == _name(key, path.read_bytes()):
                os.utime(path)
                return path
            path.unlink()
    except OSError:  # somebody else removes it, or may not be asked
        return None
    return None


def drop(path: Path) -> None:
    """Forget a library that turned out wrong."""
    with contextlib.suppress(OSError):
        path.unlink()


def put(key: str, library: Path) -> Path:
    """Keep a library.

    Raises:
        OSError: no space, no permission.
    """
    contents = library.read_bytes()
    place = folder()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = place / _name(key, contents)
    with tempfile.NamedTemporaryFile(dir=place, suffix=".part", delete=False) as part:
        try:
            part.write(contents)
            part.flush()
            os.fsync(part.fileno())
            os.replace(part.name, path)
        except BaseException:
            drop(Path(part.name))
            raise
    with contextlib.suppress(OSError):  # another process tidies up, too
        files = sorted(place.glob("*.so"), key=lambda file: file.stat().st_mtime)
        for old in files[:-MAX_FILES]:
            old.unlink()
    return path


def _name(key: str, contents: bytes) -> str:
    return f"{key}-{hashlib.sha256(key.encode() + contents).hexdigest()}.so"


def _is_ours(place: Path) -> bool:
    """Whether nobody else can have put a file there."""
    status = place.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def machine() -> tuple[str, ...]:
    """The processor, as far as code that is compiled for it depends on it."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        first = text.split("\n\n")[0].splitlines()
        lines = [line for line in first if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return (platform.machine(), torch.backends.cpu.get_cpu_capability(), *lines)
