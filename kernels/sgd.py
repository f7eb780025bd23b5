"""SGD with clipping and EMA folded in: one launch for any number of tensors.

    g <- clip_coef * g                                     (stored, where the caller wants clipped gradients)
    d  = weight_decay * p + (-g if maximize else g)
    m <- momentum * m + (1 - dampening) * d                (the first time: m <- d)
    p <- p - lr * (d + momentum * m if nesterov else m)    (momentum == 0: m is d, and there is no buffer)
    average <- average * (1 - w) + w * p                   (see ema.py; also where there is no gradient)
Source: torch.optim.SGD and torch.nn.utils.clip_grad_norm_, operation by operation, in float32 whatever the tensors'
dtypes. With a float32 master, that is the parameter, and the parameter itself gets its rounded values; where the two do
not agree, somebody has written to the parameter, and the master follows.

Cost in B per element, all float32: 20 with momentum (p, g, m read; p, m written), 12 without, + 8 with EMA, + 4 for
gradients written back where clipping bites. bfloat16 parameters and gradients with float32 masters and momenta: 22.
lr and the other numbers, clip_coef, found_inf and the average's weight are read on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .chunks import LAUNCH, TAIL, address_at, aligned, chunk_at, current, elements, vectorised
from .ema import ema_chunk
from .prepare import options_at
from .update import Kind, Rows, gradient_block, is_updated, store_block, weights_of_average


def sgd_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    clip_coef: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """(p, m) after one step; ``m`` None is the first time. In the dtype of ``p``."""
    d = clip_coef * (-g if maximize else g)
    if weight_decay != 0:
        d = d + weight_decay * p
    if momentum == 0:
        return p - lr * d, None
    m = d if m is None else momentum * m + (1 - dampening) * d
    return p - lr * (d + momentum * m if nesterov else m), m


@triton.jit
def _sgd_block(
    pointers,
    i,
    mask,
    numbers,
    MASTER: tl.constexpr,
    CLIP: tl.constexpr,
    WRITE_BACK: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    EMA: tl.constexpr,
):
    p_ptr, g_ptr, m_ptr, e_ptr, low_ptr = pointers
    lr, weight_decay, momentum, undamped, is_first, clip_coef, ema_momentum, ema_keep = numbers
    p = current(p_ptr, low_ptr, i, mask, MASTER)
    d = gradient_block(g_ptr, i, mask, clip_coef, CLIP, WRITE_BACK, MAXIMIZE)
    d = tl.where(weight_decay != 0.0, d + weight_decay * p, d)  # a select: 0 * inf would be NaN
    if MOMENTUM:
        m = tl.load(m_ptr + i, mask=mask).to(tl.float32)
        m = tl.where(is_first, d, momentum * m + undamped * d)
        tl.store(m_ptr + i, m.to(m_ptr.dtype.element_ty), mask=mask)
        d = d + momentum * m if NESTEROV else m
    p = p - lr * d
    store_block(p, p_ptr, low_ptr, e_ptr, i, mask, ema_momentum, ema_keep, MASTER, EMA)


@triton.jit
def _sgd_kernel(
    chunks,
    parameters,
    grads,
    buffers,
    averages,
    lows,
    counts,
    scalars,
    values,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    LOW: tl.constexpr,
    MASTER: tl.constexpr,
    EMA: tl.constexpr,
    CLIP: tl.constexpr,
    WRITE_BACK: tl.constexpr,
    SKIP: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, group, first, length = chunk_at(chunks, tl.program_id(0))
    options = options_at(values, group)
    lr, weight_decay = tl.load(options).to(tl.float32), tl.load(options + 1).to(tl.float32)
    momentum, undamped = tl.load(options + 2).to(tl.float32), (1.0 - tl.load(options + 3)).to(tl.float32)
    ema_momentum, ema_keep = weights_of_average(values)
    clip_coef = tl.load(scalars + 1)
    is_first = lr != lr  # False, unless FIRST
    if FIRST:
        is_first = tl.load(tl.load(counts + tensor).to(tl.pointer_type(tl.float32))) == 1.0
    p_at = address_at(parameters, tensor, first, P)
    e_at = address_at(averages, tensor, first, E) if EMA else p_at
    low_at = address_at(lows, tensor, first, LOW) if MASTER else p_at
    if is_updated(grads, scalars, tensor, SKIP):
        numbers = (lr, weight_decay, momentum, undamped, is_first, clip_coef, ema_momentum, ema_keep)
        g_at = address_at(grads, tensor, first, G)
        m_at = address_at(buffers, tensor, first, S) if MOMENTUM else p_at
        whole = vectorised(length, p_at | g_at | m_at | e_at | low_at, BLOCK)
        pointers = (aligned(p_at, P), aligned(g_at, G), aligned(m_at, S), aligned(e_at, E), aligned(low_at, LOW))
        for start in range(0, whole, BLOCK):
            i = start + tl.arange(0, BLOCK)
            _sgd_block(pointers, i, None, numbers, MASTER, CLIP, WRITE_BACK, MAXIMIZE, MOMENTUM, NESTEROV, EMA)
        pointers = (elements(p_at, P), elements(g_at, G), elements(m_at, S), elements(e_at, E), elements(low_at, LOW))
        for start in range(whole, length, TAIL):
            i = start + tl.arange(0, TAIL)
            _sgd_block(pointers, i, i < length, numbers, MASTER, CLIP, WRITE_BACK, MAXIMIZE, MOMENTUM, NESTEROV, EMA)
    elif EMA:
        ema_chunk(e_at, p_at, low_at, length, ema_momentum, ema_keep, E, P, LOW, MASTER, BLOCK)


def launch_sgd(
    chunks: Tensor,
    rows: Rows,
    scalars: Tensor,
    values: Tensor,
    kind: Kind,
    *,
    nesterov: bool = False,
    block: int | None = None,
) -> None:
    """Update all tensors that the chunks belong to and that have a gradient; average all of them.

    Args:
        chunks: int64 (num_chunks, 4), see chunks.py.
        rows: addresses. ``states`` is (momentum buffers,), or () for momentum 0. With ``counts``, a tensor whose count
            is 1 gets the first step's rule; without, buffers of zeros do, where dampening is 0.
        scalars: float32 (3,) of ``launch_prepare``; read with clip or skip_nonfinite.
        values: float64 (1 + num_groups, 8), see prepare.py.
        kind: what all these tensors have in common.
        nesterov: look ahead.
        block: elements at once; for tests.
    """
    if not len(chunks):
        return
    _sgd_kernel[(len(chunks),)](
        chunks,
        rows.params,
        rows.grads,
        rows.states[0] if rows.states else rows.params,
        rows.params if rows.averages is None else rows.averages,
        rows.params if rows.lows is None else rows.lows,
        rows.params if rows.counts is None else rows.counts,
        scalars,
        values,
        **kind.constants(),
        MOMENTUM=bool(rows.states),
        NESTEROV=nesterov,
        FIRST=bool(rows.states) and rows.counts is not None,
        BLOCK=block or kind.block,
        **LAUNCH,
    )
