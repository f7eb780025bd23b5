"""A list of operations as one function that numba compiles: each output value is written once, nothing is kept between.

    kernel(source, ids, key, constants, table, out)

For each sample it draws the operations' parameters from (key, id), works out which source row and column each output
row and column shows (through all operations, last to first), then goes over the output. On bytes, the leading
pointwise operations become a table of 256 values a channel: one load instead of arithmetic, the same bits.

The text of the function is put together here and kept as a file beside the compiled code, in the cache folder, under
the hash of everything it follows from. A new process loads it in some 0.1 s instead of compiling for seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .builtin import cache_dir
from .operations import Layout, Operation

_logger = logging.getLogger("fastrunner")

_HEAD = '''"""Made by fastrunner.data.fuse for {names}."""

import numpy as np
from numba import njit


@njit(cache=True)
def mix(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
'''


@dataclass
class Fused:
    """The compiled function, and what goes with it.

    Attributes:
        shape: of one image that comes out.
        dtype: of its values.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    kernel: Callable[..., None]
    constants: tuple[Any, ...]
    table: NDArray[Any]

    def __call__(
        self, source: NDArray[Any], ids: NDArray[np.int64], key: NDArray[np.uint64], out: NDArray[Any]
    ) -> None:
        """Write ``source[ids]``, operated on, into ``out``. Leaves the GIL."""
        self.kernel(source, ids, key[0], self.constants, self.table, out)


def fuse(operations: Sequence[Operation], images: NDArray[Any], layout: str) -> Fused:
    """Compile ``operations`` for ``images``, (N, ...), each of which lies as ``layout`` (``"HWC"`` or ``"CHW"``) says.

    Raises:
        ImportError: numba is not installed.
        ValueError: an operation cannot take what the one before gives, or numba cannot compile it.
    """
    numba = _import_numba()
    plan = _Plan(operations, images.shape[1:], images.dtype, layout)
    module = _load(plan, numba)
    out_shape = plan.out_shape()
    constants = tuple(operation.constants() for operation in plan.operations) or ((0,),)
    table = np.zeros((plan.channels, 256), dtype=plan.table_dtype)
    fused = Fused(out_shape, plan.out_dtype, module.kernel, constants, table)
    try:
        if plan.tabled:
            module.fill_table(constants, table)
        # On the images themselves: mapped ones are read-only, which is another type to numba.
        fused(images, np.zeros(1, np.int64), np.zeros(1, np.uint64), np.empty((1, *out_shape), plan.out_dtype))
    except numba.core.errors.NumbaError as error:
        names = ", ".join(type(operation).__name__ for operation in operations)
        raise ValueError(f"numba cannot compile the operations {names}: {error}") from error
    return fused


class _Plan:
    """What each operation gets and gives, and the text of the function."""

    def __init__(
        self, operations: Sequence[Operation], shape: Sequence[int], dtype: np.dtype[Any], layout: str
    ) -> None:
        if len(shape) != 3:
            raise ValueError(f"operations need images of three dimensions ({layout}), got shape {tuple(shape)}")
        if layout not in ("HWC", "CHW"):
            raise ValueError(f"layout must be HWC or CHW, got {layout!r}")
        self.layout = self.out_layout = layout
        height, width, self.channels = shape if layout == "HWC" else (shape[1], shape[2], shape[0])
        self.operations: list[Operation] = []
        self.sizes = [(height, width)]  # before each operation, and after the last
        self.dtypes = [dtype]  # as the sizes
        for operation in operations:
            if isinstance(operation, Layout):
                self.out_layout = operation.order
                continue
            operation.check(height, width, self.channels, dtype)
            height, width = operation.out_size(height, width)
            dtype = operation.out_dtype(dtype)
            self.operations.append(operation)
            self.sizes.append((height, width))
            self.dtypes.append(dtype)
        self.out_dtype = dtype
        self.tabled = self._tabled() if self.dtypes[0] == np.uint8 else []
        self.table_dtype = self.dtypes[self.tabled[-1] + 1] if self.tabled else np.dtype(np.uint8)

    def _tabled(self) -> list[int]:
        """Numbers of the leading operations on values, as long as they are pointwise."""
        tabled: list[int] = []
        for number, operation in enumerate(self.operations):
            if operation.value is None:
                if tabled and (operation.row is not None or operation.column is not None):
                    break  # its fill is in the units of what comes out of the table
                continue
            if not operation.pointwise:
                break
            tabled.append(number)
        return tabled

    def out_shape(self) -> tuple[int, int, int]:
        height, width = self.sizes[-1]
        return (height, width, self.channels) if self.out_layout == "HWC" else (self.channels, height, width)

    def text(self) -> str:
        names = ", ".join(type(operation).__name__ for operation in self.operations)
        lines = [_HEAD.format(names=names or "no operation"), "", *self._table_lines(), "", *self._kernel_lines()]
        return "\n".join(lines) + "\n"

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The operations' functions under the names that the text uses."""
        found = {}
        for number, operation in enumerate(self.operations):
            for part in ("draw", "row", "column", "value"):
                function = getattr(operation, part)
                if inspect.ismethod(function):
                    raise ValueError(
                        f"{type(operation).__name__}.{part} must be a staticmethod: numba compiles it alone"
                    )
                if function is not None:
                    found[f"{part}{number}"] = function
        return found

    def _table_lines(self) -> list[str]:
        lines = ["@njit(cache=True)", "def fill_table(k, table):", f"    for c in range({self.channels}):"]
        lines += ["        for byte in range(256):", "            v = np.uint8(byte)"]
        v = "v"
        for number in self.tabled:
            lines.append(f"            v{number} = {self._typed(number, v, '0', '0', 'c', '(0,)')}")
            v = f"v{number}"
        return [*lines, f"            table[c, byte] = {v}"]

    def _typed(self, number: int, v: str, y: str, x: str, c: str, p: str) -> str:
        """A call of an operation's ``value``, its result in the type that the operation says."""
        return f"np.{self.dtypes[number + 1].name}(value{number}({v}, {y}, {x}, {c}, {p}, k[{number}]))"

    def _kernel_lines(self) -> list[str]:
        height, width = self.sizes[-1]
        last = len(self.operations)
        most = max([1, *(operation.num_uniforms for operation in self.operations)])
        lines = ["@njit(nogil=True, cache=True)", "def kernel(source, ids, key, k, table, out):"]
        lines += [f"    u = np.empty({most})"]
        lines += [f"    columns{n} = np.empty({width}, np.uint64)" for n in range(last + 1) if self._keeps(n)]
        lines += [f"    outside{n} = np.zeros({width}, np.bool_)" for n in self._fills("column")]
        lines += ["    for n in range(len(ids)):", "        src, dst = source[ids[n]], out[n]"]
        lines += ["        stream = mix(key ^ mix(np.uint64(ids[n])))", *self._draw_lines()]
        lines += [f"        for x in range({width}):", f"            x{last} = x"]
        lines += self._trace_lines("column", " " * 12)
        lines += [f"            columns{n}[x] = x{n}" for n in range(last + 1) if self._keeps(n)]
        lines += [f"        for y in range({height}):", f"            y{last} = y"]
        lines += self._trace_lines("row", " " * 12)
        lines += ["            row = np.uint64(y0)", f"            for x in range({width}):"]
        lines += ["                column = columns0[x]", *self._outside_lines(" " * 16)]
        for c in range(self.channels):
            lines += self._value_lines(c, " " * 16)
        return lines

    def _keeps(self, number: int) -> bool:
        """Whether columns before operation ``number`` are looked at: the source's, and where a value asks for x."""
        if number == 0:
            return True
        return number < len(self.operations) and self.operations[number].value is not None and number not in self.tabled

    def _fills(self, part: str) -> list[int]:
        """The operations whose rows or columns may point outside."""
        return [
            n for n, each in enumerate(self.operations) if getattr(each, part) is not None and each.fill is not None
        ]

    def _draw_lines(self) -> list[str]:
        lines, drawn = [], 0
        for number, operation in enumerate(self.operations):
            height, width = self.sizes[number]
            for j in range(operation.num_uniforms):
                step = (0x9E3779B97F4A7C15 * (drawn + j + 1)) % 2**64
                lines.append(
                    f"        u[{j}] = np.float64(mix(stream + np.uint64({step})) >> np.uint64(11)) * 2.0**-53"
                )
            drawn += operation.num_uniforms
            draw = f"draw{number}(u, {height}, {width}, k[{number}])" if operation.draw is not None else "(0,)"
            lines.append(f"        p{number} = {draw}")
        return lines

    def _trace_lines(self, part: str, indent: str) -> list[str]:
        """From an output row or column back to the source's, noting where it is outside."""
        axis = "x" if part == "column" else "y"
        lines = []
        for number in reversed(range(len(self.operations))):
            operation = self.operations[number]
            after, before = f"{axis}{number + 1}", f"{axis}{number}"
            if getattr(operation, part) is None:
                lines.append(f"{indent}{before} = {after}")
                continue
            size = self.sizes[number][1 if part == "column" else 0]
            lines.append(f"{indent}{before} = {part}{number}({after}, {size}, p{number}, k[{number}])")
            if operation.fill is not None:
                outside = f"outside{number}[x]" if part == "column" else f"outside_y{number}"
                lines.append(f"{indent}{outside} = {before} < 0 or {before} >= {size}")
            lines.append(f"{indent}{before} = min(max({before}, 0), {size - 1})")  # nobody reads beyond the source
        return lines

    def _outside_lines(self, indent: str) -> list[str]:
        rows, columns, lines = self._fills("row"), self._fills("column"), []
        for number in sorted({*rows, *columns}):
            outside = [f"outside_y{number}"] * (number in rows) + [f"outside{number}[x]"] * (number in columns)
            lines.append(f"{indent}hidden{number} = {' or '.join(outside)}")
        return lines

    def _value_lines(self, c: int, indent: str) -> list[str]:
        """One output value, through all operations, first to last. A variable for each type that it has on the way."""
        where = f"[row, column, {c}]" if self.layout == "HWC" else f"[{c}, row, column]"
        v, lines = "v", [f"{indent}v = src{where}"]
        looked_up = self.tabled[-1] if self.tabled else -1
        filled = {*self._fills("row"), *self._fills("column")}
        for number, operation in enumerate(self.operations):
            if number in filled:
                fill = f"np.{self.dtypes[number].name}({operation.fill!r})"
                lines.append(f"{indent}{v} = {fill} if hidden{number} else {v}")
            if number == looked_up:
                lines.append(f"{indent}v{number} = table[{c}, {v}]")
                v = f"v{number}"
            elif operation.value is not None and number not in self.tabled:
                column = f"np.int64(columns{number}[x])"
                call = self._typed(number, v, f"y{number}", column, str(c), f"p{number}")
                lines.append(f"{indent}v{number} = {call}")
                v = f"v{number}"
        target = f"[y, x, {c}]" if self.out_layout == "HWC" else f"[{c}, y, x]"
        return [*lines, f"{indent}dst{target} = {v}"]


def _load(plan: _Plan, numba: Any) -> ModuleType:
    """The module with the compiled functions: made, or found in the cache folder."""
    text, functions = plan.text(), plan.functions()
    parts = [text, numba.__version__, sys.version, *(_source(function) for function in functions.values())]
    name = "fused_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    if name in sys.modules:
        return sys.modules[name]
    file = _write(name, text)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # the file's name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update({key: numba.njit(function) for key, function in functions.items()})
    sys.modules[name] = module  # numba looks here when it reads its own cache
    spec.loader.exec_module(module)
    return module


def _source(function: Callable[..., Any]) -> str:
    """What the compiled code follows from: the text of ``function``, or its byte code where there is no file."""
    try:
        return inspect.getsource(function)
    except OSError:
        return repr((function.__code__.co_code, function.__code__.co_consts))


def _write(name: str, text: str) -> Path:
    folder = cache_dir() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.py"
        if not file.exists():
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as temporary:
                temporary.write(text)
            os.replace(temporary.name, file)  # whole or not at all: another process may look
        return file
    except OSError as error:
        _logger.warning(
            f"cannot write the cache folder {folder} ({error}): array operations are compiled at each start"
        )
        file = Path(tempfile.mkdtemp(prefix="fastrunner-kernels-")) / f"{name}.py"
        file.write_text(text)
        return file


def _import_numba() -> Any:
    """numba; imported when the first pipeline is compiled (0.6 s), not with fastrunner."""
    try:
        import numba
    except ImportError as error:
        raise ImportError("array operations are compiled by numba: pip install fastrunner[numba]") from error
    return numba
