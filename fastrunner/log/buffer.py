"""Running averages of what is logged, with nothing read from the device before a log is due.

    average(n)[key] = sum(value_i * count_i) / sum(count_i)         over the last n entries of each key

``update`` only keeps references; the values become Python floats when someone looks: ``average``, ``val_history`` or
``n_history``. Tensors of one dtype and device then travel to the host together, in one transfer.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_PENDING = 1024  # rows; bounds the memory of a run that nobody looks at


class LogBuffer:
    """MMCV's log buffer: ``val_history``, ``n_history`` (key -> list), ``output`` (what to log next) and ``ready``.

    Attributes:
        window: keep at least this many entries of each key and drop older ones; None keeps everything until
            ``clear()``. The runner sets it where histories would otherwise grow for the whole run.
    """

    def __init__(self) -> None:
        self.window: int | None = None
        self.output: OrderedDict[str, Any] = OrderedDict()
        self.ready = False
        self._pending: list[tuple[dict[str, Any], int]] = []
        self._values: OrderedDict[str, list[float]] = OrderedDict()
        self._counts: OrderedDict[str, list[int]] = OrderedDict()

    @property
    def val_history(self) -> OrderedDict[str, list[float]]:
        """key -> values, oldest first. Reads the host."""
        self._settle()
        return self._values

    @property
    def n_history(self) -> OrderedDict[str, list[int]]:
        """key -> counts, parallel to ``val_history``. Reads the host."""
        self._settle()
        return self._counts

    def update(self, vars: dict[str, Any], count: int = 1) -> None:
        """Remember one value a key, each with weight ``count``. Values: numbers, or tensors of one element.

        Tensors are kept as they are (detached, not copied, not read). Cost: well under a microsecond for a few keys.
        """
        if not isinstance(vars, dict):
            raise TypeError(f"log_vars must be a dict of name -> value, got {type(vars).__name__}")
        row = vars.copy()  # a model may use its dict again
        for key, value in row.items():
            if type(value) is not float and isinstance(value, Tensor) and value.requires_grad:
                row[key] = value.detach()  # or a log interval's graphs would stay alive
        self._pending.append((row, count))
        if len(self._pending) >= _MAX_PENDING:
            self._settle()

    def average(self, n: int = 0) -> None:
        """Put the mean of each key's last ``n`` entries (0: all) into ``output``, as numpy float64, and set ``ready``.

        Raises:
            ValueError: ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        self._settle()
        for key, history in self._values.items():
            values = np.array(history[-n:], dtype=np.float64)
            counts = np.array(self._counts[key][-n:])
            total = counts.sum()
            self.output[key] = (values * counts).sum() / total if total else np.float64("nan")
        self.ready = True

    def clear_output(self) -> None:
        """Forget what was averaged, keep the histories."""
        self.output.clear()
        self.ready = False

    def clear(self) -> None:
        """Forget everything."""
        self._pending.clear()
        self._values.clear()
        self._counts.clear()
        self.clear_output()

    def _settle(self) -> None:
        """Move the pending rows into the histories, as floats, one key at a time."""
        if not self._pending:
            return
        rows, self._pending = self._pending, []
        kinds: dict[tuple[str, ...], list[tuple[dict[str, Any], int]]] = {}
        for row in rows:
            kinds.setdefault(tuple(row[0]), []).append(row)
        keys = [key for kind in kinds for key in kind]
        if len(keys) > len(set(keys)):  # a key comes in rows of several kinds: only row by row keeps its order
            kinds = {(key,): [row for row in rows if key in row[0]] for key in dict.fromkeys(keys)}
        columns = _floats({key: [row[key] for row, _ in group] for kind, group in kinds.items() for key in kind})
        for kind, group in kinds.items():
            counts = [count for _, count in group]
            for key in kind:
                self._values.setdefault(key, []).extend(columns[key])
                self._counts.setdefault(key, []).extend(counts)
        if self.window is not None:
            for key in self._values:  # 2x: so that trimming is rare, not a copy at every log
                if len(self._values[key]) > 2 * self.window:
                    del self._values[key][: -self.window], self._counts[key][: -self.window]


def _floats(columns: dict[str, list[Any]]) -> dict[str, list[float]]:
    """All values as Python floats: one transfer for all columns of tensors on a device."""
    floats: dict[str, list[float]] = {}
    stacks: dict[torch.device, dict[str, Tensor]] = {}
    for key, column in columns.items():
        first = column[0]
        try:
            if isinstance(first, Tensor):
                stack = torch.stack(column).reshape(len(column)).double()
                stacks.setdefault(stack.device, {})[key] = stack
            else:
                floats[key] = list(map(float, column))
        except (TypeError, RuntimeError, ValueError):  # tensors among numbers, on two devices, or of several elements
            floats[key] = [_float(key, value) for value in column]
    for stack_of in stacks.values():
        numbers = iter(torch.cat(list(stack_of.values())).tolist())
        for key, stack in stack_of.items():
            floats[key] = list(islice(numbers, len(stack)))
    return floats


def _float(key: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"log_vars[{key!r}] has shape {tuple(value.shape)}; log one number a key, e.g. its .mean()")
    return float(value)
