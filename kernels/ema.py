"""Exponential averages of any number of tensors in one launch.

    average <- average * (1 - momentum) + momentum * value          momentum == 0: the average stays as it is
Source: MMCV 1.x's EMAHook, formula and order of operations; torch's lerp rounds differently.

Cost: 12 B per float32 element. momentum is read on the device, so a captured graph may be replayed with another one;
0 leaves the average alone even where the value is inf or NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    CHUNK,
    DTYPES,
    LAUNCH,
    TAIL,
    address_at,
    address_rows,
    aligned,
    block_for,
    check_lists,
    chunk_at,
    chunk_rows,
    current,
    elements,
    launch_on,
    to_device,
    vectorised,
)


def ema_reference(averages: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> list[Tensor]:
    if momentum == 0:
        return [a.clone() for a in averages]
    return [
        (a.float() * (1 - momentum) + momentum * v.float()).to(a.dtype) for a, v in zip(averages, values, strict=True)
    ]


@triton.jit
def averaged(average, value, momentum, keep):
    """One block, in float32; ``keep`` is 1 - momentum, rounded once."""
    return tl.where(momentum != 0.0, average * keep + momentum * value, average)


@triton.jit
def _ema_block(e_ptr, v_ptr, low_ptr, i, mask, momentum, keep, MASTER: tl.constexpr):
    average = tl.load(e_ptr + i, mask=mask).to(tl.float32)
    value = current(v_ptr, low_ptr, i, mask, MASTER)
    tl.store(e_ptr + i, averaged(average, value, momentum, keep).to(e_ptr.dtype.element_ty), mask=mask)


@triton.jit
def ema_chunk(
    e_at,
    v_at,
    low_at,
    length,
    momentum,
    keep,
    E: tl.constexpr,
    V: tl.constexpr,
    LOW: tl.constexpr,
    MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor, from its three addresses; ``low_at`` counts with MASTER."""
    whole = vectorised(length, e_at | v_at | low_at, BLOCK)
    e_ptr, v_ptr, low_ptr = aligned(e_at, E), aligned(v_at, V), aligned(low_at, LOW)
    for start in range(0, whole, BLOCK):
        _ema_block(e_ptr, v_ptr, low_ptr, start + tl.arange(0, BLOCK), None, momentum, keep, MASTER)
    e_ptr, v_ptr, low_ptr = elements(e_at, E), elements(v_at, V), elements(low_at, LOW)
    for start in range(whole, length, TAIL):
        i = start + tl.arange(0, TAIL)
        _ema_block(e_ptr, v_ptr, low_ptr, i, i < length, momentum, keep, MASTER)


@triton.jit
def _ema_kernel(chunks, averages, parameters, momentum, E: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    tensor, _group, first, length = chunk_at(chunks, tl.program_id(0))
    m = tl.load(momentum).to(tl.float64)
    e_at, v_at = address_at(averages, tensor, first, E), address_at(parameters, tensor, first, V)
    ema_chunk(e_at, v_at, v_at, length, m.to(tl.float32), (1.0 - m).to(tl.float32), E, V, V, False, BLOCK)


def launch_ema(
    chunks: Tensor,
    averages: Tensor,
    values: Tensor,
    momentum: Tensor,
    *,
    average_dtype: torch.dtype,
    value_dtype: torch.dtype,
    block: int | None = None,
) -> None:
    """Average all tensors that the chunks belong to.

    Args:
        chunks: int64 (num_chunks, 4).
        averages, values: int64 (num_tensors,) addresses, none of them 0.
        momentum: one floating point element on the device.
        average_dtype, value_dtype: of all of them.
    """
    if len(chunks):
        dtypes = {"E": DTYPES[average_dtype], "V": DTYPES[value_dtype]}
        block = block or block_for(average_dtype, value_dtype)
        _ema_kernel[(len(chunks),)](chunks, averages, values, momentum, **dtypes, BLOCK=block, **LAUNCH)


def ema_(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    momentum: Tensor,
    *,
    chunk: int = CHUNK,
    block: int | None = None,
) -> None:
    """Averages alone, in place.

    Args:
        averages, values: dense tensors on one device, in pairs of equal shape and order in memory.
        momentum: one floating point element on their device: the weight of the new value.
    Raises:
        ValueError: the lists do not go together, or momentum is not one element on the device.
    Cost: as above, and a table of addresses to the device in each call; an optimizer's table keeps it.
    """
    check_lists(averages, values)
    if not averages:
        return
    device = averages[0].device
    if momentum.numel() != 1 or momentum.device != device or not momentum.is_floating_point():
        raise ValueError(f"momentum must be one floating point element on {device}, got {momentum!r}")
    pairs: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for average, value in zip(averages, values, strict=True):
        pairs.setdefault((average.dtype, value.dtype), []).append((average, value))
    with launch_on(device):
        for (average_dtype, value_dtype), tensors in pairs.items():
            numels = [average.numel() for average, _ in tensors]
            rows = to_device(chunk_rows(numels, [0] * len(tensors), chunk=chunk), device)
            average_row, value_row = to_device(address_rows(*zip(*tensors, strict=True)), device)
            dtypes = {"average_dtype": average_dtype, "value_dtype": value_dtype}
            launch_ema(rows, average_row, value_row, momentum, **dtypes, block=block)
