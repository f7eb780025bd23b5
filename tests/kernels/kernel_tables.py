"""Tensors of awkward sizes and alignments, and the tables through which kernels see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastrunner.kernels.chunks import chunk_rows
from fastrunner.kernels.prepare import values_tensor
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


def chunks(tensors: Sequence[Tensor], groups: Sequence[int], device: torch.device) -> Tensor:
    return chunk_rows([t.numel() for t in tensors], groups, chunk=CHUNK).to(device)


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
