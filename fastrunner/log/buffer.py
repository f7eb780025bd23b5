"""Running averages of what is logged, with nothing read from the device before a log is due.

    average(n)[key] = sum(value_i * count_i) / sum(count_i)         over the last n entries of each key

``update`` only keeps references; the values become Python floats when someone looks: ``average``, ``val_history`` or
``n_history``. Tensors of one dtype and device then travel to the host together, in one transfer.
"""

from __future__ import annotations

from collections import OrderedDict
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
        row = {
            k: v if type(v) is float or not (isinstance(v, Tensor) and v.requires_grad) else v.detach()
            for k, v in vars.items()
        }
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
        columns = {key: [row[key] for row, _ in group] for kind, group in kinds.items() for key in kind}
        _tensors_to_floats(columns)
        for kind, group in kinds.items():
            counts = [count for _, count in group]
            for key in kind:
                self._values.setdefault(key, []).extend(map(float, columns[key]))
                self._counts.setdefault(key, []).extend(counts)
        if self.window is not None:
            for key in self._values:  # 2x: so that trimming is rare, not a copy at every log
                if len(self._values[key]) > 2 * self.window:
                    del self._values[key][: -self.window], self._counts[key][: -self.window]


def _tensors_to_floats(columns: dict[str, list[Any]]) -> None:
    """Replace the tensors of all columns by floats: one stack and one transfer for each (device, dtype)."""
    places: dict[tuple[torch.device, torch.dtype], list[tuple[list[Any], int]]] = {}
    for key, column in columns.items():
        for i, value in enumerate(column):
            if isinstance(value, Tensor):
                if value.dim() != 0:
                    column[i] = value = _scalar(key, value)
                places.setdefault((value.device, value.dtype), []).append((column, i))
    for group in places.values():
        floats = torch.stack([column[i] for column, i in group]).double().tolist()
        for (column, i), number in zip(group, floats, strict=True):
            column[i] = number


def _scalar(key: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"log_vars[{key!r}] has shape {tuple(value.shape)}; log one number a key, e.g. its .mean()")
    return value.reshape(())
