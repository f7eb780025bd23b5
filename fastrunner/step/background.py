"""Compiling in another process, with the lowest priority and one thread, while training goes on.

The process leaves what it compiled in inductor's cache on disk; this one finds it there, which takes about a second. It
dies, or does not end: training does not notice, and ``poll`` says so.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .aot_cache import apply_settings, put, settings
from .torch_private import (
    Lowered,
    Unfit,
    compile_ahead,
    compile_graph,
    compile_order,
    graph_bytes,
    graph_of_bytes,
)

TIMEOUT_S = 1800.0


def whole_order(graph: GraphModule, args: Sequence[Tensor], ahead: str | None = None) -> dict[str, Any]:
    """What ``Job`` is to compile: a traced step, whole.

    Args:
        args: example inputs; only their shapes, strides, dtypes travel.
        ahead: make a library, and keep it in ``aot_cache`` under this key, instead of leaving inductor's own result.
    Raises:
        Exception: the graph cannot be handed over.
    """
    shapes = [(tuple(a.shape), a.stride(), a.dtype) for a in args]
    return {"whole": graph_bytes(graph), "args": shapes, "ahead": ahead}


def halves_order(halves: Sequence[Lowered]) -> dict[str, Any]:
    """The same for captured modules."""
    return {"halves": [half.order() for half in halves]}


class Job:
    """Something that is being compiled elsewhere.

    Args:
        order: what, of ``whole_order`` or ``halves_order``.
        timeout_s: after it the process is ended.
    Raises:
        OSError: no room for the file that hands it over.
    """

    def __init__(self, order: dict[str, Any], timeout_s: float | None = None) -> None:
        self._timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        self._until = time.monotonic() + self._timeout_s
        folder = tempfile.mkdtemp(prefix="fastrunner-compile-")
        self._errors = Path(folder) / "stderr"
        path = Path(folder) / "order.pkl"
        try:
            path.write_bytes(pickle.dumps({**order, "settings": settings()}))
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "fastrunner.step.background", str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # its compilers end with it
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.close = weakref.finalize(self, _end, self._process, folder)

    def poll(self) -> str | None:
        """None while it runs; then "", or what went wrong."""
        code = self._process.poll()
        if code is None and time.monotonic() < self._until:
            return None
        why = ""
        if code is None:
            why = f"compiling took longer than {self._timeout_s:.0f} s"
        elif code < 0:
            why = f"the compiling process died of signal {-code}"
        elif code > 0:
            lines = self._errors.read_text(errors="replace").strip().splitlines()
            why = f"compiling failed: {lines[-1][:300] if lines else f'exit code {code}'}"
        self.close()
        return why


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def main(path: str) -> None:
    """The other process: compile, and leave the result in the cache."""
    os.nice(19)
    with open(path, "rb") as file:
        order = pickle.load(file)
    apply_settings(order["settings"])
    for data, options in order.get("halves", ()):
        compile_order(data, options)
    if "whole" not in order:
        return
    args = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in order["args"]]
    graph = graph_of_bytes(order["whole"])
    if order["ahead"] is None:
        compile_graph(graph, args)
        return
    try:
        put(order["ahead"], compile_ahead(graph, args, Path(path).parent))
    except Unfit as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1])
