"""Augmentations in Python, compiled by numba, inside a DALI pipeline.

numba's callbacks cannot raise: DALI calls them from its own threads, an exception is printed, and whatever the output
held goes into the batch. ``Errors`` notices it instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from .runtime import import_dali

Augment = Callable[..., None]


def numba_augment(function: Augment, image: Any, *numbers: Any) -> Any:
    """A node that calls ``function(out, image, *numbers)`` for each sample, on the CPU; ``out`` is what comes out.

    Args:
        function: plain Python that numba can compile; ``out`` and ``image`` are uint8 arrays of shape (H, W, C), alike,
            and each of ``numbers`` a float32 array of one dimension. It may raise.
        image: node, uint8 (H, W, C).
        numbers: nodes, float32 of one dimension, such as ``sample_input("uniform", count=3)``; at most five.
    Raises:
        ImportError: numba is not installed.
        numba.core.errors.NumbaError: the function cannot be compiled; the message has file and line.
    Cost: compiling takes 1 to 2 s, once for each function in a process.
    """
    return _operator(function, len(numbers))(image, *numbers)


@functools.lru_cache(maxsize=32)  # a pipeline is built again for each sample that is suspected when one fails
def _operator(function: Augment, num_numbers: int) -> Any:
    _, _, types = import_dali()
    try:
        from nvidia.dali.plugin.numba import NumbaFunction
    except ImportError as error:
        raise ImportError("numba_augment needs numba: pip install fastrunner[numba]") from error
    return NumbaFunction(
        run_fn=function,
        setup_fn=_like_first,
        in_types=[types.UINT8] + [types.FLOAT] * num_numbers,
        out_types=[types.UINT8],
        ins_ndim=[3] + [1] * num_numbers,
        outs_ndim=[3],
        batch_processing=False,
    )


def _like_first(outs: Any, ins: Any) -> None:
    """Shapes of the output: those of the first input. Compiled by numba."""
    for sample in range(len(outs[0])):
        outs[0][sample][:] = ins[0][sample]


class Errors:
    """Exceptions in numba's callbacks since the last look, of the whole process. One object; loaders switch it on."""

    def __init__(self) -> None:
        self._seen: list[Exception] = []
        self._users = 0
        self._before: Any = None

    def watch(self) -> None:
        """Note exceptions from now on."""
        if self._users == 0:
            self._before, sys.unraisablehook = sys.unraisablehook, self._note
        self._users += 1

    def leave(self) -> None:
        """The opposite of ``watch``."""
        self._users -= 1
        if self._users == 0 and sys.unraisablehook == self._note:
            sys.unraisablehook = self._before

    def take(self) -> Exception | None:
        """The first exception since the last call."""
        if not self._seen:
            return None
        first = self._seen[0]
        self._seen.clear()
        return first

    def _note(self, unraisable: Any) -> None:
        # numba names the source of the exception by the repr of its CPU target's context
        if "numba" in str(unraisable.object) and isinstance(unraisable.exc_value, Exception):
            self._seen.append(unraisable.exc_value)
        else:
            self._before(unraisable)


ERRORS = Errors()
