"""Running averages of what is logged, with nothing read from the device before a log is due.

    average(n)[key] = sum(value_i * count_i) / sum(count_i)         over the last n entries of each key

``update`` only keeps references; tensors become Python floats when someone looks (``average``, ``val_history``), and
those of one device then travel to the host together, in one transfer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STRETCH = 1024  # entries between two looks at the size of the histories


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
        self._entries: dict[str, list[tuple[Any, int]]] = {}  # (value, count); from _read on, values may be tensors
        self._push: dict[str, Callable[[tuple[Any, int]], None]] = {}  # key -> append to its entries
        self._read: dict[str, int] = {}  # key -> how many of its values are floats
        self._left = _STRETCH  # updates until the next look at the size

    @property
    def val_history(self) -> OrderedDict[str, list[float]]:
        """key -> values, oldest first. Reads the device."""
        self._to_floats()
        return OrderedDict((key, [value for value, _ in entries]) for key, entries in self._entries.items())

    @property
    def n_history(self) -> OrderedDict[str, list[int]]:
        """key -> counts, parallel to ``val_history``."""
        return OrderedDict((key, [count for _, count in entries]) for key, entries in self._entries.items())

    def update(self, vars: dict[str, Any], count: int = 1) -> None:
        """Remember one value a key, each with weight ``count``. Values: numbers, or tensors of one element.

        Tensors are kept as they are (detached, not copied, not read). Cost: a fraction of a microsecond a key.
        """
        if not isinstance(vars, dict):
            raise TypeError(f"log_vars must be a dict of name -> value, got {type(vars).__name__}")
        push = self._push
        for key, value in vars.items():
            if type(value) is not float and isinstance(value, Tensor) and value.requires_grad:
                value = value.detach()  # or the graphs of a whole log interval would stay alive
            if key not in push:
                self._entries[key], self._read[key] = [], 0
                push[key] = self._entries[key].append
            push[key]((value, count))
        self._left -= 1
        if self._left <= 0:
            self._bound()

    def put(self, key: str, number: float) -> None:
        """``update({key: number})``, at a third of its cost."""
        if key in self._push:
            self._push[key]((number, 1))
            self._left -= 1
        else:
            self.update({key: number})

    def average(self, n: int = 0) -> None:
        """Put the mean of each key's last ``n`` entries (0: all) into ``output``, as numpy float64, and set ``ready``.

        Raises:
            ValueError: ``n`` is negative, or a value is a tensor of several elements.
        """
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        self._to_floats()
        for key, entries in self._entries.items():
            values = np.array([value for value, _ in entries[-n:]], dtype=np.float64)
            counts = np.array([count for _, count in entries[-n:]])
            total = counts.sum()
            self.output[key] = (values * counts).sum() / total if total else np.float64("nan")
        self.ready = True

    def clear_output(self) -> None:
        """Forget what was averaged, keep the histories."""
        self.output.clear()
        self.ready = False

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._push.clear()
        self._read.clear()
        self.clear_output()

    def _bound(self) -> None:
        """Turn tensors into floats, which are smaller, and drop what is older than the window."""
        self._left = _STRETCH
        self._to_floats()
        if self.window is not None:
            for key, entries in self._entries.items():
                del entries[: max(len(entries) - self.window, 0)]
                self._read[key] = len(entries)

    def _to_floats(self) -> None:
        """Replace the tensors of all histories by floats: one transfer for each device."""
        stacks: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for key, entries in self._entries.items():
            fresh = [value for value, _ in entries[self._read[key] :]]
            if not fresh:
                continue
            try:
                if isinstance(fresh[0], Tensor):
                    stack = torch.stack(fresh).reshape(len(fresh)).double()
                    stacks.setdefault(stack.device, []).append((key, stack))
                else:
                    self._replace(key, map(float, fresh))
            except (TypeError, RuntimeError, ValueError):  # tensors among numbers, on two devices, of several elements
                self._replace(key, [_float(key, value) for value in fresh])
        for keyed in stacks.values():
            floats = iter(torch.cat([stack for _, stack in keyed]).tolist())
            for key, stack in keyed:
                self._replace(key, islice(floats, len(stack)))

    def _replace(self, key: str, floats: Iterable[float]) -> None:
        """Put ``floats`` where the values of ``key`` stood that had not been read."""
        entries, start = self._entries[key], self._read[key]
        entries[start:] = [(value, count) for value, (_, count) in zip(floats, entries[start:], strict=True)]
        self._read[key] = len(entries)


def _float(key: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"log_vars[{key!r}] has shape {tuple(value.shape)}; log one number a key, e.g. its .mean()")
    return float(value)
