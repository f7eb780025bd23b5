"""Adam and AdamW with clipping and EMA folded in: one launch for any number of tensors.

    g <- clip_coef * g                            (stored, where the caller wants clipped gradients)
    g  = -g if maximize else g
    Adam:  g = g + weight_decay * p               AdamW:  p <- p * (1 - lr * weight_decay)
    exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g * g
    max_exp_avg_sq <- max(max_exp_avg_sq, exp_avg_sq)     (amsgrad, which then takes its place below)
    p <- p - step_size * exp_avg / (sqrt(exp_avg_sq) / denom_bias + eps)
    average <- average * (1 - w) + w * p          (see ema.py; also where there is no gradient)
Source: Kingma, Ba 2014, https://arxiv.org/abs/1412.6980, algorithm 1; Loshchilov, Hutter 2017,
https://arxiv.org/abs/1711.05101, algorithm 2; torch.optim.Adam and AdamW, operation by operation, in float32 whatever
the tensors' dtypes. step_size and denom_bias come from prepare.py. With a float32 master, that is the parameter, and
the parameter itself gets its rounded values; where the two do not agree, somebody has written to the parameter, and the
master follows.

Cost in B per element, all float32: 28 (p, g, exp_avg, exp_avg_sq read; all but g written), + 8 with EMA, + 8 with
amsgrad, + 4 for gradients written back where clipping bites. bfloat16 parameters and gradients with float32 masters and
states: 30.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import LAUNCH, TAIL, address_at, aligned, chunk_at, current, elements, vectorised
from .ema import ema_chunk
from .prepare import options_at
from .update import Kind, Rows, gradient_block, is_updated, store_block, weights_of_average


def adam_reference(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_coef: float = 1.0,
    max_exp_avg_sq: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(p, exp_avg, exp_avg_sq, and max_exp_avg_sq if given) after step number ``step`` = 1, 2, ... In p's dtype."""
    g = clip_coef * (-g if maximize else g)
    if decoupled:
        p = p * (1 - lr * weight_decay)
    elif weight_decay != 0:
        g = g + weight_decay * p
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * g
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * g * g
    step_size, denom_bias = lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
    largest = () if max_exp_avg_sq is None else (torch.maximum(max_exp_avg_sq, exp_avg_sq),)
    scale = largest[0] if largest else exp_avg_sq
    return p - step_size * exp_avg / (scale.sqrt() / denom_bias + eps), exp_avg, exp_avg_sq, *largest


@triton.jit
def _adam_block(
    pointers,
    i,
    mask,
    numbers,
    MASTER: tl.constexpr,
    CLIP: tl.constexpr,
    WRITE_BACK: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    EMA: tl.constexpr,
):
    p_ptr, g_ptr, m_ptr, v_ptr, x_ptr, e_ptr, low_ptr = pointers
    step_size, denom_bias, decay, beta1, keep1, beta2, keep2, eps, clip_coef, ema_momentum, ema_keep = numbers
    p = current(p_ptr, low_ptr, i, mask, MASTER)
    g = gradient_block(g_ptr, i, mask, clip_coef, CLIP, WRITE_BACK, MAXIMIZE)
    if DECOUPLED:
        p = p * decay
    else:
        g = tl.where(decay != 0.0, g + decay * p, g)  # a select: 0 * inf would be NaN
    m = beta1 * tl.load(m_ptr + i, mask=mask).to(tl.float32) + keep1 * g
    v = beta2 * tl.load(v_ptr + i, mask=mask).to(tl.float32) + keep2 * g * g
    tl.store(m_ptr + i, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + i, v.to(v_ptr.dtype.element_ty), mask=mask)
    if AMSGRAD:
        x = tl.load(x_ptr + i, mask=mask).to(tl.float32)
        v = tl.maximum(x, v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x_ptr + i, v.to(x_ptr.dtype.element_ty), mask=mask)
    denom = tl.div_rn(tl.sqrt_rn(v), denom_bias) + eps
    p = p - step_size * tl.div_rn(m, denom)
    store_block(p, p_ptr, low_ptr, e_ptr, i, mask, ema_momentum, ema_keep, MASTER, EMA)


@triton.jit
def _adam_kernel(
    chunks,
    parameters,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    averages,
    lows,
    bias,
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
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, group, first, length = chunk_at(chunks, tl.program_id(0))
    options = options_at(values, group)
    weight_decay, beta1, beta2 = tl.load(options + 1), tl.load(options + 2), tl.load(options + 3)
    decay = weight_decay.to(tl.float32)
    if DECOUPLED:
        decay = (1.0 - tl.load(options) * weight_decay).to(tl.float32)
    ema_momentum, ema_keep = weights_of_average(values)
    p_at = address_at(parameters, tensor, first, P)
    e_at = address_at(averages, tensor, first, E) if EMA else p_at
    low_at = address_at(lows, tensor, first, LOW) if MASTER else p_at
    if is_updated(grads, scalars, tensor, SKIP):
        # fmt: off
        numbers = (
            tl.load(bias + 2 * tensor), tl.load(bias + 2 * tensor + 1), decay,
            beta1.to(tl.float32), (1.0 - beta1).to(tl.float32), beta2.to(tl.float32), (1.0 - beta2).to(tl.float32),
            tl.load(options + 4).to(tl.float32), tl.load(scalars + 1), ema_momentum, ema_keep,
        )
        # fmt: on
        g_at = address_at(grads, tensor, first, G)
        m_at, v_at = address_at(exp_avgs, tensor, first, S), address_at(exp_avg_sqs, tensor, first, S)
        x_at = address_at(max_exp_avg_sqs, tensor, first, S) if AMSGRAD else p_at
        whole = vectorised(length, p_at | g_at | m_at | v_at | x_at | e_at | low_at, BLOCK)
        p_ptr, g_ptr, m_ptr, v_ptr = aligned(p_at, P), aligned(g_at, G), aligned(m_at, S), aligned(v_at, S)
        pointers = (p_ptr, g_ptr, m_ptr, v_ptr, aligned(x_at, S), aligned(e_at, E), aligned(low_at, LOW))
        for start in range(0, whole, BLOCK):
            i = start + tl.arange(0, BLOCK)
            _adam_block(pointers, i, None, numbers, MASTER, CLIP, WRITE_BACK, MAXIMIZE, DECOUPLED, AMSGRAD, EMA)
        p_ptr, g_ptr, m_ptr, v_ptr = elements(p_at, P), elements(g_at, G), elements(m_at, S), elements(v_at, S)
        pointers = (p_ptr, g_ptr, m_ptr, v_ptr, elements(x_at, S), elements(e_at, E), elements(low_at, LOW))
        for start in range(whole, length, TAIL):
            i = start + tl.arange(0, TAIL)
            inside = i < length
            _adam_block(pointers, i, inside, numbers, MASTER, CLIP, WRITE_BACK, MAXIMIZE, DECOUPLED, AMSGRAD, EMA)
    elif EMA:
        ema_chunk(e_at, p_at, low_at, length, ema_momentum, ema_keep, E, P, LOW, MASTER, BLOCK)


def launch_adam(
    chunks: Tensor,
    rows: Rows,
    bias: Tensor,
    scalars: Tensor,
    values: Tensor,
    kind: Kind,
    *,
    decoupled: bool,
    block: int | None = None,
) -> None:
    """Update all tensors that the chunks belong to and that have a gradient; average all of them.

    Args:
        chunks: int64 (num_chunks, 4), see chunks.py.
        rows: addresses; ``states`` is (exp_avg, exp_avg_sq), with amsgrad and max_exp_avg_sq.
        bias: float32 (num_tensors, 2) of ``launch_prepare``, which counts the step.
        scalars: float32 (3,) of ``launch_prepare``; read with clip or skip_nonfinite.
        values: float64 (1 + num_groups, 8), see prepare.py.
        kind: what all these tensors have in common.
        decoupled: AdamW's weight decay.
        block: elements at once; for tests.
    """
    if not len(chunks):
        return
    exp_avgs, exp_avg_sqs, *largest = rows.states
    _adam_kernel[(len(chunks),)](
        chunks,
        rows.params,
        rows.grads,
        exp_avgs,
        exp_avg_sqs,
        largest[0] if largest else rows.params,
        rows.params if rows.averages is None else rows.averages,
        rows.params if rows.lows is None else rows.lows,
        bias,
        scalars,
        values,
        **kind.constants(),
        DECOUPLED=decoupled,
        AMSGRAD=bool(largest),
        BLOCK=block or kind.block,
        **LAUNCH,
    )
