"""The joint L2 norm of any number of gradients, and the factor that clips them.

    grad_norm = ||(g_1, ..., g_k)||_2
    clip_coef = min(1, max_norm / (grad_norm + 1e-6))
    found_inf = 1 if grad_norm is not finite, else 0
Source: Pascanu, Mikolov, Bengio 2013, https://arxiv.org/abs/1211.5063, algorithm 1; the 1e-6 is torch's.

Two launches and no atomics: each program leaves the sum of squares of its chunk as a float64, then one program adds
those up, always in the same order, so the same gradients give the same bits. Squares are added in float32 lanes
(16 terms a lane in a chunk) and the lanes in float64.
Cost: 4 B per float32 element, 2 B per 16-bit element; torch's ``clip_grad_norm_`` moves 12 B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    BLOCK,
    CHUNK,
    DTYPES,
    LAUNCH,
    TAIL,
    address_at,
    address_rows,
    aligned,
    check_lists,
    chunk_at,
    chunk_rows,
    elements,
    launch_on,
    to_device,
    vectorised,
)

NORM, CLIP_COEF, FOUND_INF = 0, 1, 2  # places in ``scalars``
NUM_SCALARS = 3


def grad_norm_reference(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """float32 (3,): grad_norm, clip_coef, found_inf; the sum in float64."""
    squares = [g.double().square().sum() for g in grads]
    norm = torch.stack(squares).sum().sqrt().float() if squares else torch.zeros((), device="cpu")
    return torch.stack([norm, (max_norm / (norm + 1e-6)).clamp(max=1.0), (~norm.isfinite()).float()])


@triton.jit
def _sum_squares_kernel(chunks, grads, partials, G: tl.constexpr, BLOCK: tl.constexpr):
    """partials[chunk] = sum of squares; 0 where the tensor has no gradient."""
    tensor, _group, first, length = chunk_at(chunks, tl.program_id(0))
    total = tl.zeros((), tl.float64)
    if tl.load(grads + tensor) != 0:
        address = address_at(grads, tensor, first, G)
        whole = vectorised(length, address, BLOCK)
        g_ptr = aligned(address, G)
        lanes = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, whole, BLOCK):
            g = tl.load(g_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
            lanes += g * g
        total = tl.sum(lanes.to(tl.float64))
        g_ptr = elements(address, G)
        tail = tl.zeros((TAIL,), tl.float32)
        for start in range(whole, length, TAIL):
            i = start + tl.arange(0, TAIL)
            g = tl.load(g_ptr + i, mask=i < length, other=0.0).to(tl.float32)
            tail += g * g
        total += tl.sum(tail.to(tl.float64))
    tl.store(partials + tl.program_id(0), total)


@triton.jit
def finish_norm(partials, num_partials, max_norm, scalars, BLOCK: tl.constexpr):
    """Stores grad_norm, clip_coef and found_inf, and gives found_inf. For one program."""
    lanes = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_partials, BLOCK):
        i = start + tl.arange(0, BLOCK)
        lanes += tl.load(partials + i, mask=i < num_partials, other=0.0)
    norm = tl.sqrt(tl.sum(lanes)).to(tl.float32)
    found_inf = tl.where(tl.abs(norm) < float("inf"), 0.0, 1.0)  # NaN < inf is false
    clip_coef = tl.div_rn(tl.load(max_norm).to(tl.float32), norm + 1e-6)
    tl.store(scalars, norm)
    tl.store(scalars + 1, tl.where(clip_coef > 1.0, 1.0, clip_coef))  # NaN stays NaN
    tl.store(scalars + 2, found_inf)
    return found_inf


@triton.jit(do_not_specialize=["num_partials"])
def _finish_norm_kernel(partials, num_partials, max_norm, scalars, BLOCK: tl.constexpr):
    finish_norm(partials, num_partials, max_norm, scalars, BLOCK)


def launch_sum_squares(
    chunks: Tensor, grads: Tensor, partials: Tensor, *, dtype: torch.dtype, block: int = BLOCK
) -> None:
    """First launch: one float64 a chunk.

    Args:
        chunks: int64 (num_chunks, 4).
        grads: int64 (num_tensors,) addresses; 0 counts as no gradient.
        partials: float64 (num_chunks,), written.
        dtype: of all gradients that the chunks belong to.
    """
    if len(chunks):
        _sum_squares_kernel[(len(chunks),)](chunks, grads, partials, G=DTYPES[dtype], BLOCK=block, **LAUNCH)


def launch_finish_norm(partials: Tensor, max_norm: Tensor, scalars: Tensor) -> None:
    """Second launch.

    Args:
        partials: float64 (num_chunks,), of all first launches.
        max_norm: one float64 element on the device; inf where nothing is to be clipped.
        scalars: float32 (3,), gets grad_norm, clip_coef, found_inf.
    """
    _finish_norm_kernel[(1,)](partials, len(partials), max_norm, scalars, BLOCK=BLOCK, **LAUNCH)


def grad_norm(
    grads: Sequence[Tensor], max_norm: float = float("inf"), *, chunk: int = CHUNK, block: int = BLOCK
) -> Tensor:
    """The norm alone.

    Args:
        grads: dense tensors of any shapes on one device, float32, bfloat16 or float16, mixed.
        max_norm: what ``clip_coef`` would bring the norm to.
    Returns:
        float32 (3,) on the device: grad_norm, clip_coef, found_inf. Nothing waits for the host.
    Raises:
        ValueError: several devices, another dtype, a tensor with gaps.
    Cost: as above, and a table of addresses to the device in each call; an optimizer's table keeps it.
    """
    check_lists(grads)
    device = grads[0].device if grads else torch.device("cpu")
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in grads:
        by_dtype.setdefault(g.dtype, []).append(g)
    scalars = torch.empty(NUM_SCALARS, dtype=torch.float32, device=device)
    if not grads:
        return scalars.copy_(grad_norm_reference(grads, max_norm))
    parts = []
    with launch_on(device):
        for dtype, tensors in by_dtype.items():
            rows = to_device(chunk_rows([g.numel() for g in tensors], [0] * len(tensors), chunk=chunk), device)
            addresses = to_device(address_rows(tensors), device)[0]
            parts.append(torch.empty(len(rows), dtype=torch.float64, device=device))
            launch_sum_squares(rows, addresses, parts[-1], dtype=dtype, block=block)
        limit = torch.full((), max_norm, dtype=torch.float64, device=device)
        launch_finish_norm(torch.cat(parts), limit, scalars)
    return scalars
