"""An exponential moving average of parameters, taken with the update of the weights.

    average <- average * (1 - m) + m * p
Source: MMCV 1.x's EMAHook, operation by operation: the product is rounded before the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class EmaTerm:
    """What ``step(ema=...)`` of the fused optimizers averages: ``averages[i]`` follows ``params[i]``.

    Args:
        params: of any shapes, dtypes and devices; frozen ones, and ones of no optimizer, too.
        averages: tensors of the same shapes. They are written to in place.
        momentum: m, the weight of the newest parameters. May be set anew before each step; on a GPU it may be a 0-D
            tensor there, so that a captured CUDA graph may be replayed with another.
        of_masters: averages of 16-bit parameters are float32, and follow the float32 masters.
    Raises:
        ValueError: there are not as many averages as parameters, or their shapes differ.
    """

    __slots__ = ("averages", "momentum", "of_masters", "params")

    def __init__(
        self,
        params: Sequence[Tensor],
        averages: Sequence[Tensor],
        momentum: float | Tensor,
        *,
        of_masters: bool = False,
    ) -> None:
        if len(params) != len(averages):
            raise ValueError(f"an average for each parameter is wanted: {len(params)} parameters, {len(averages)}")
        for i, (param, average) in enumerate(zip(params, averages, strict=True)):
            if param.shape != average.shape:
                raise ValueError(
                    f"average {i} has shape {tuple(average.shape)}, its parameter has shape {tuple(param.shape)}"
                )
        # Tuples: what a table was built for cannot change unseen.
        self.params, self.averages = tuple(params), tuple(averages)
        self.momentum = momentum
        self.of_masters = of_masters

    @torch.no_grad()
    def update(self) -> None:
        """Take the average now, with torch's operations: two passes, 20 B a float32 value."""
        if self.params:
            momentum = float(self.momentum)
            torch._foreach_mul_(self.averages, 1 - momentum)
            torch._foreach_add_(self.averages, self.params, alpha=momentum)
