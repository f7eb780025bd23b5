"""The values of one logged key, on the host as floats, or still on the device that they were computed on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


class History:
    """Values and their counts, oldest first.

    Attributes:
        counts: weight of each value.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: list[int] = []
        self._floats: list[float] = []
        self._tail: list[Tensor] = []  # behind the floats: float64 vectors on another device than the CPU

    def floats(self) -> list[float]:
        """All values; reads the device. The live list."""
        for stack in self._tail:
            self._floats.extend(stack.tolist())
        self._tail.clear()
        return self._floats

    def extend(self, values: Sequence[Any], counts: Sequence[int]) -> None:
        """Append values: numbers, or tensors of one element.

        Raises:
            ValueError: a tensor of several elements.
        """
        self.counts.extend(counts)
        try:
            if type(values[0]) is float or not isinstance(values[0], Tensor):
                self.floats().extend(list(map(float, values)))
            elif values[0].device.type == "cpu":  # no transfer to save; one by one is the quickest
                self.floats().extend([value.item() for value in values])
            else:
                with torch.no_grad():
                    self._tail.append(torch.stack(tuple(values)).reshape(len(values)).double())
        except (AttributeError, TypeError, RuntimeError, ValueError):  # tensors among numbers, of several elements
            self.floats().extend([_float(self.name, value) for value in values])

    @property
    def on_device(self) -> bool:
        """Whether the latest values are still on the device that they were computed on."""
        return bool(self._tail)

    def tail_mean(self, n: int) -> Tensor | None:
        """Weighted mean of the last ``n`` values (0: all), 0-D; None where they are not together on a device."""
        if not self._tail:
            return None
        counts = self.counts[-n:]
        if len(self._tail[-1]) < len(counts) or not any(counts):
            return None
        values = self._tail[-1][-n:]
        weights = torch.tensor(counts, dtype=torch.float64).to(values.device, non_blocking=True)
        return torch.dot(values, weights) / float(sum(counts))

    def keep_last(self, n: int, slack: int) -> None:
        """Where there are more than ``n + slack`` values, drop what is older than the last ``n``; reads the device."""
        if len(self.counts) <= n + slack:
            return
        values = self.floats()
        del values[: max(len(values) - n, 0)]
        del self.counts[: max(len(self.counts) - n, 0)]


def last_means(histories: list[History], n: int) -> list[np.float64]:
    """The weighted mean of each history's last ``n`` values (0: all), with one transfer for each device."""
    means: dict[int, np.float64] = {}
    on_device: dict[torch.device, dict[int, Tensor]] = {}
    by_length: dict[int, list[int]] = {}
    for i, history in enumerate(histories):
        mean = history.tail_mean(n) if history.on_device else None
        if mean is not None:
            on_device.setdefault(mean.device, {})[i] = mean
        else:
            by_length.setdefault(len(history.counts[-n:]), []).append(i)
    for waiting in on_device.values():
        means.update(zip(waiting, map(np.float64, torch.stack(list(waiting.values())).tolist()), strict=True))
    for length, places in by_length.items():
        last = slice(-length, None)
        values, counts = [histories[i].floats()[last] for i in places], [histories[i].counts[last] for i in places]
        means.update(zip(places, _means(values, counts, length), strict=True))
    return [means[i] for i in range(len(histories))]


def _means(values: list[list[float]], counts: list[list[int]], length: int) -> list[np.float64]:
    """The weighted mean of each row, all rows at once; numpy sums a row of a matrix as it sums a vector."""
    matrix = np.fromiter(chain.from_iterable(values), np.float64).reshape(len(values), length)
    weights = [each[0] for each in counts] if length else []
    if length and all(type(w) is int and each.count(w) == length for w, each in zip(weights, counts, strict=True)):
        totals = [weight * length for weight in weights]  # one weight a row: as exact, and no second matrix
        factors = np.array(weights, np.float64)[:, None]
    else:
        factors = np.fromiter(chain.from_iterable(counts), np.float64).reshape(matrix.shape)
        totals = np.add.reduce(factors, axis=1).tolist()
    sums = np.add.reduce(matrix * factors, axis=1).tolist()
    if all(totals):
        return [np.float64(each / total) for each, total in zip(sums, totals, strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):  # no weight at all: NaN
        return list(np.array(sums) / np.array(totals, np.float64))


def check_dict(vars: Any) -> None:
    """Raise TypeError unless ``vars`` is a dict."""
    if not isinstance(vars, dict):
        raise TypeError(f"log_vars must be a dict of name -> value, got {type(vars).__name__}")


def check_single(name: str, value: Tensor) -> None:
    """Raise ValueError unless ``value`` has exactly one element."""
    if value.numel() != 1:
        raise ValueError(f"log_vars[{name!r}] has shape {tuple(value.shape)}; log one number a key, e.g. its .mean()")


def _float(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        check_single(name, value)
    return float(value)
