"""Tensors of awkward sizes and alignments, and the tables through which kernels see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from fastrunner.kernels.chunks import chunk_rows
from fastrunner.kernels.prepare import values_tensor
from fastrunner.kernels.update import Kind, Rows
from torch import Tensor

BLOCK, CHUNK = 512, 1_024  # small, so that little data goes through many programs and blocks
# Nothing; one; around the unvectorised block of 256, the block and the chunk; several chunks with an odd tail.
SIZES = (0, 1, 255, 256, 257, 511, 512, 513, 1_023, 1_024, 1_025, 3_333)

# Triton's interpreter truncates to 16 bits where a GPU rounds: off by one unit in the last place.
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def randn(size: int, device: torch.device, dtype: torch.dtype = torch.float32, *, offset: int = 0) -> Tensor:
    """Random numbers, ``offset`` elements behind the start of their memory: not aligned to 16 bytes for small ones."""
    return torch.randn(size + offset).to(device, dtype)[offset:]


def many(
    device: torch.device, dtype: torch.dtype = torch.float32, *, sizes: Sequence[int] = SIZES, offsets: bool = True
) -> list[Tensor]:
    """One tensor a size, every second one unaligned."""
    return [randn(n, device, dtype, offset=i % 4 if offsets and i % 2 else 0) for i, n in enumerate(sizes)]


def addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """A row: 0 for None; a tensor without elements has an address that nobody follows."""
    return torch.tensor([0 if t is None else t.data_ptr() or 16 for t in tensors], dtype=torch.int64).to(device)


def values(
    groups: Sequence[Sequence[float]],
    device: torch.device,
    *,
    max_norm: float = float("inf"),
    ema_momentum: float = 0.0,
) -> Tensor:
    """Options of the groups, as the kernels want them."""
    table = values_tensor(len(groups))
    table[0, :2] = torch.tensor([max_norm, ema_momentum], dtype=torch.float64)
    for g, row in enumerate(groups):
        table[1 + g, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return table.to(device)


def assert_near(found: Tensor, expected: Tensor, *, roundings: int) -> None:
    """Off by at most so many roundings of the value, or of 1 if that is more: what was added up was of order 1."""
    bound = roundings * ULP[found.dtype] * expected.abs().clamp(min=1.0)
    off = (found.double() - expected).abs()
    assert bool((off <= bound).all()), f"off by {off.max().item()}, at most {bound.min().item()} is allowed"


class Tensors:
    """Parameters in some groups with all that an update may touch, but for its states."""

    def __init__(self, device: torch.device, kind: Kind, num_groups: int, sizes: Sequence[int]) -> None:
        self.device, self.kind = device, kind
        self.groups = [i % num_groups for i in range(len(sizes))]
        self.params = many(device, kind.param, sizes=sizes)
        self.grads: list[Tensor | None] = list(many(device, kind.grad, sizes=sizes))
        self.averages = many(device, kind.average, sizes=sizes) if kind.average else []
        self.lows = [p.to(kind.low) for p in self.params] if kind.low else []
        if kind.low:  # masters agree with their parameters
            for p, low in zip(self.params, self.lows, strict=True):
                p.copy_(low)

    def rows(self, *states: Sequence[Tensor], counts: Sequence[Tensor] = ()) -> Rows:
        """The addresses, for a launch."""
        return Rows(
            addresses(self.params, self.device),
            addresses(self.grads, self.device),
            torch.tensor(self.groups, device=self.device),
            tuple(addresses(tensors, self.device) for tensors in states),
            addresses(self.averages, self.device) if self.averages else None,
            addresses(self.lows, self.device) if self.lows else None,
            addresses(counts, self.device) if counts else None,
        )

    def chunks(self) -> Tensor:
        return chunk_rows([p.numel() for p in self.params], self.groups, chunk=CHUNK).to(self.device)

    def acts(self, i: int, found_inf: float) -> bool:
        """Whether tensor i is to be updated."""
        return self.grads[i] is not None and not (self.kind.skip_nonfinite and found_inf)

    def check(self, i: int, exact: Exact, *, roundings: int, ema_momentum: float) -> None:
        """What was written to tensor i, and to what goes with it."""
        assert_near(self.params[i], exact.param, roundings=roundings)
        if self.lows:
            assert_near(self.lows[i], self.params[i].double(), roundings=1)
        if self.averages and exact.average is not None:
            expected = exact.average * (1 - ema_momentum) + ema_momentum * exact.param
            assert_near(self.averages[i], expected, roundings=roundings)
        if exact.clipped is not None:
            assert_near(self.grads[i], exact.clipped, roundings=1)


class Exact(NamedTuple):
    """In float64: a parameter after the update, its average before it, its gradient if it is to be written back."""

    param: Tensor
    average: Tensor | None
    clipped: Tensor | None
