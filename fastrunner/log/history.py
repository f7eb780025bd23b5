"""The values of one logged key, on the host as floats, or still on the device that they were computed on."""

from __future__ import annotations

from collections.abc import Sequence
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

    @torch.no_grad()
    def extend(self, values: Sequence[Any], counts: Sequence[int]) -> None:
        """Append values: numbers, or tensors of one element.

        Raises:
            ValueError: a tensor of several elements.
        """
        self.counts.extend(counts)
        try:
            if isinstance(values[0], Tensor):
                stack = torch.stack(tuple(values)).reshape(len(values)).double()
                if stack.device.type == "cpu":
                    self.floats().extend(stack.tolist())
                else:
                    self._tail.append(stack)
            else:
                self.floats().extend(list(map(float, values)))
        except (TypeError, RuntimeError, ValueError):  # tensors among numbers, on two devices, of several elements
            self.floats().extend([_float(self.name, value) for value in values])

    @torch.no_grad()
    def mean(self, n: int) -> Tensor | float:
        """Weighted mean of the last ``n`` values (0: all): of what is on a device, a 0-D float64 tensor there."""
        counts = np.array(self.counts[-n:])
        total = counts.sum()
        if not total:
            return float("nan")
        if self._tail and len(self._tail[-1]) >= len(counts):
            values = self._tail[-1][-n:]
            return torch.dot(values, torch.as_tensor(counts, dtype=torch.float64).to(values.device)) / float(total)
        array = np.array(self.floats()[-n:], dtype=np.float64)
        return float((array * counts).sum() / total)

    def keep_last(self, n: int, slack: int) -> None:
        """Where there are more than ``n + slack`` values, drop what is older than the last ``n``; reads the device."""
        if len(self.counts) <= n + slack:
            return
        values = self.floats()
        del values[: max(len(values) - n, 0)]
        del self.counts[: max(len(self.counts) - n, 0)]


def host_means(means: list[Tensor | float]) -> list[np.float64]:
    """The same means on the host, with one transfer for each device."""
    waiting: dict[torch.device, list[int]] = {}
    for i, mean in enumerate(means):
        if isinstance(mean, Tensor):
            waiting.setdefault(mean.device, []).append(i)
    result = [np.float64("nan") if isinstance(mean, Tensor) else np.float64(mean) for mean in means]
    for places in waiting.values():
        read = torch.stack([means[i] for i in places]).tolist()  # type: ignore[misc]
        for place, mean in zip(places, read, strict=True):
            result[place] = np.float64(mean)
    return result


def check_single(name: str, value: Tensor) -> None:
    """Raise ValueError unless ``value`` has exactly one element."""
    if value.numel() != 1:
        raise ValueError(f"log_vars[{name!r}] has shape {tuple(value.shape)}; log one number a key, e.g. its .mean()")


def _float(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        check_single(name, value)
    return float(value)
