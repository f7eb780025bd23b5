"""Operations on images in arrays, declared one by one and compiled together into one pass (see ``fuse``).

Each is a small class: numbers it is made with, and up to four plain functions that numba compiles.

    draw(u, height, width, k) -> p     once a sample: what is random, from ``num_uniforms`` numbers in [0, 1)
    row(y, height, p, k) -> int        which row of its input an output row shows; below 0: none, ``fill`` is shown
    column(x, width, p, k) -> int      the same for columns
    value(v, y, x, c, p, k) -> v       a value from its input's value; with ``pointwise`` it looks at v, c and k only

``k`` is the tuple ``constants()``, ``p`` the tuple that ``draw`` returned. Height and width are the input's. What
``value`` returns is stored as ``out_dtype`` says. An operation of your own is such a class, registered:

    @OPERATIONS.register_module()
    class Solarize(Operation):
        pointwise = True
        def __init__(self, threshold): self.threshold = threshold
        def constants(self): return (self.threshold,)
        @staticmethod
        def value(v, y, x, c, p, k): return 255 - v if v >= k[0] else v
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from ..registry import OPERATIONS


class Operation:
    """Base of the operations; see the top of this file.

    Attributes:
        num_uniforms: random numbers that ``draw`` gets.
        pointwise: ``value`` depends on the value and its channel only. On bytes it becomes a table.
        fill: what is shown where ``row`` or ``column`` point outside; None: they never do.
    """

    num_uniforms: ClassVar[int] = 0
    pointwise: ClassVar[bool] = False
    fill: float | None = None
    draw: ClassVar[Callable[..., Any] | None] = None
    row: ClassVar[Callable[..., Any] | None] = None
    column: ClassVar[Callable[..., Any] | None] = None
    value: ClassVar[Callable[..., Any] | None] = None

    def constants(self) -> tuple[Any, ...]:
        """Numbers and small arrays for the functions; their types are compiled in, their values are not."""
        return (0,)

    def check(self, height: int, width: int, channels: int, dtype: np.dtype[Any]) -> None:
        """Raise ValueError where the operation cannot take such images."""

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def out_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype


def _pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be >= 1, got {size}")
    return int(height), int(width)


def _probability(value: float) -> float:
    if not 0 <= value <= 1:  # also catches NaN
        raise ValueError(f"prob must be in 0..1, got {value}")
    return float(value)


@OPERATIONS.register_module()
class RandomCrop(Operation):
    """A window of ``size`` anywhere in the image, which is first widened by ``padding`` on each side with ``fill``."""

    num_uniforms = 2

    def __init__(self, size: int | Sequence[int], padding: int = 0, fill: float = 0) -> None:
        if padding < 0:
            raise ValueError(f"padding must be >= 0, got {padding}")
        self.size, self.padding, self.fill = _pair("size", size), padding, fill

    def check(self, height: int, width: int, channels: int, dtype: np.dtype[Any]) -> None:
        if self.size[0] > height + 2 * self.padding or self.size[1] > width + 2 * self.padding:
            raise ValueError(
                f"RandomCrop: a window of {self.size} does not fit into images of {(height, width)} with a padding of "
                f"{self.padding}"
            )

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        return self.size

    def constants(self) -> tuple[Any, ...]:
        return (*self.size, self.padding)

    @staticmethod
    def draw(u, height, width, k):  # type: ignore[no-untyped-def]  # compiled by numba, as all functions here
        return int(u[0] * (height + 2 * k[2] - k[0] + 1)) - k[2], int(u[1] * (width + 2 * k[2] - k[1] + 1)) - k[2]

    @staticmethod
    def row(y, height, p, k):  # type: ignore[no-untyped-def]
        return y + p[0]

    @staticmethod
    def column(x, width, p, k):  # type: ignore[no-untyped-def]
        return x + p[1]


@OPERATIONS.register_module()
class CenterCrop(Operation):
    """The window of ``size`` in the middle."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = _pair("size", size)

    def check(self, height: int, width: int, channels: int, dtype: np.dtype[Any]) -> None:
        if self.size[0] > height or self.size[1] > width:
            raise ValueError(f"CenterCrop: a window of {self.size} does not fit into images of {(height, width)}")

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        return self.size

    def constants(self) -> tuple[Any, ...]:
        return self.size

    @staticmethod
    def row(y, height, p, k):  # type: ignore[no-untyped-def]
        return y + (height - k[0]) // 2

    @staticmethod
    def column(x, width, p, k):  # type: ignore[no-untyped-def]
        return x + (width - k[1]) // 2


@OPERATIONS.register_module()
class RandomFlip(Operation):
    """Left to right, with probability ``prob``."""

    num_uniforms = 1

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = _probability(prob)

    def constants(self) -> tuple[Any, ...]:
        return (self.prob,)

    @staticmethod
    def draw(u, height, width, k):  # type: ignore[no-untyped-def]
        return (1 if u[0] < k[0] else 0,)

    @staticmethod
    def column(x, width, p, k):  # type: ignore[no-untyped-def]
        return width - 1 - x if p[0] == 1 else x


@OPERATIONS.register_module()
class Cutout(Operation):
    """A square of ``size`` around a random pixel is shown as ``fill``, with probability ``prob``; it may stick out.

    Source: DeVries, Taylor 2017, https://arxiv.org/abs/1708.04552.
    """

    num_uniforms = 3

    def __init__(self, size: int, fill: float = 0, prob: float = 1.0) -> None:
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self.size, self.fill, self.prob = size, fill, _probability(prob)

    def constants(self) -> tuple[Any, ...]:
        return self.size, self.prob, self.fill

    @staticmethod
    def draw(u, height, width, k):  # type: ignore[no-untyped-def]
        top, left = int(u[0] * height) - k[0] // 2, int(u[1] * width) - k[0] // 2
        size = k[0] if u[2] < k[1] else 0
        return top, top + size, left, left + size

    @staticmethod
    def value(v, y, x, c, p, k):  # type: ignore[no-untyped-def]
        return k[2] if p[0] <= y < p[1] and p[2] <= x < p[3] else v


@OPERATIONS.register_module()
class Normalize(Operation):
    """``(v - mean[c]) * (1 / std[c])`` in float32; mean and std in units of the values."""

    pointwise = True

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        self.mean, self.std = (np.atleast_1d(np.asarray(each, np.float32)) for each in (mean, std))
        if len(self.mean) != len(self.std) or not (self.std > 0).all():
            raise ValueError(f"mean and std must be as many, and std positive; got {mean} and {std}")

    def check(self, height: int, width: int, channels: int, dtype: np.dtype[Any]) -> None:
        if len(self.mean) not in (1, channels):
            raise ValueError(f"Normalize: {len(self.mean)} means for images of {channels} channels")

    def out_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def constants(self) -> tuple[Any, ...]:
        return self.mean, np.float32(1) / self.std

    @staticmethod
    def value(v, y, x, c, p, k):  # type: ignore[no-untyped-def]
        i = min(c, len(k[0]) - 1)  # one number serves all channels
        return (np.float32(v) - k[0][i]) * k[1][i]


@OPERATIONS.register_module()
class Cast(Operation):
    """Values as another type: float32 or float64."""

    pointwise = True

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"Cast: dtype must be float32 or float64, got {dtype}")

    def out_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return self.dtype

    @staticmethod
    def value(v, y, x, c, p, k):  # type: ignore[no-untyped-def]
        return v


@OPERATIONS.register_module()
class Layout(Operation):
    """How the images lie that come out: ``"CHW"`` or ``"HWC"``."""

    def __init__(self, order: str = "CHW") -> None:
        if order not in ("CHW", "HWC"):
            raise ValueError(f"Layout: order must be CHW or HWC, got {order!r}")
        self.order = order
