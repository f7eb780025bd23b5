"""Which lines of the user's code make the host wait for the device: found by watching a few iterations.

On a GPU such a line stops the host until everything that was launched before it has run. On a CPU it costs little, but
a step that reads the host cannot be compiled as a whole, so it is named there as well.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WATCHED = 10  # iterations

# Calls that give the host values of a tensor, or a size that depends on them. By name: methods and functions alike.
READERS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}
READERS |= {"equal", "allclose", "__contains__", "__array__", "__repr__", "__format__"}
READERS |= {"__bool__", "__int__", "__float__", "__index__", "__complex__"}
_OURS = ("fastrunner", "torch")
LOG, INSIDE = "a log that was due", "inside torch or fastrunner"


_watches: list[tuple[Any, Any]] = []  # the modes of those that are under way, the newest last


@contextmanager
def unwatched() -> Iterator[None]:
    """Within: the reads of the iteration under watch are not its own. A recipe is being made, which reads a lot."""
    if not _watches:
        yield
        return
    functions, operators = _watches[-1]
    operators.__exit__(None, None, None)
    functions.__exit__(None, None, None)
    try:
        yield
    finally:
        functions.__enter__()
        operators.__enter__()


class HostReads:
    """Counts the reads of ``WATCHED`` iterations by the line that made them, once ``arm`` was called.

    Attributes:
        left: iterations still to be watched.
        watched: iterations that were.
        lines: (file, line number) -> reads; where no line of the user's made the read, (LOG or INSIDE, 0).
    """

    def __init__(self) -> None:
        self.left = 0
        self.watched = 0
        self.lines: Counter[tuple[str, int]] = Counter()

    def arm(self) -> None:
        """Watch the next iterations, unless that was done already."""
        if not self.watched:
            self.left = WATCHED

    def watch(self, iteration: Callable[[Any], None], runner: Any) -> None:
        """Run one iteration under watch."""
        with ExitStack() as stack:
            functions = stack.enter_context(_Functions(self))
            operators = stack.enter_context(_Operators(self, functions))
            _watches.append((functions, operators))
            stack.callback(_watches.pop)
            iteration(runner)
        self.left -= 1
        self.watched += 1
        if not self.left:
            runner.logger.info("Lines that read the host:\n  " + "\n  ".join(self.report()))

    def note(self) -> None:
        """A read has happened; whose line is it?"""
        self.lines[_users_line(sys._getframe(2))] += 1

    def report(self) -> list[str]:
        """One line of text each, the most frequent first."""
        if not self.watched:
            return [f"the next {self.left} iterations will be watched" if self.left else "not watched yet"]
        if not self.lines:
            return [f"none in {self.watched} iterations"]
        rows = []
        for (file, number), count in self.lines.most_common():
            code = linecache.getline(file, number).strip()
            where = f"{file}:{number}" if number else file
            rows.append(f"{where}  {count / self.watched:g} an iteration  {code}".rstrip())
        return rows


def _users_line(frame: FrameType | None) -> tuple[str, int]:
    """The innermost frame that is neither torch's nor ours."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in _OURS:
            return frame.f_code.co_filename, frame.f_lineno
        if module.startswith("fastrunner.log."):
            return LOG, 0
        if module.startswith(("fastrunner.plan.", "fastrunner.runner.")):
            break  # the loop itself: what is further out did not make the read
        frame = frame.f_back
    return INSIDE, 0


class _Functions(TorchFunctionMode):
    """Sees calls from Python, also those that cost nothing on a CPU tensor and wait on a GPU: ``.cpu()``."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads
        self.inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in READERS or self.inside:
            return func(*args, **(kwargs or {}))
        self.reads.note()
        self.inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees reads that operators make themselves, from C++ and from backward."""

    def __init__(self, reads: HostReads, functions: _Functions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads, self.functions = reads, functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default
        if reads and not self.functions.inside:
            self.reads.note()
        return func(*args, **(kwargs or {}))
