"""What an update has to know before it starts, worked out on the device by one small program.

    grad_norm, clip_coef, found_inf     from the sums of squares: see grad_norm.py
    step      <- step + 1               for every tensor with a gradient; not at all if the step is to be skipped
    step_size  = lr / (1 - beta1**step)           Adam's bias corrections, in float64
    denom_bias = sqrt(1 - beta2**step)
Source: torch.optim.Adam, capturable; powers as exp(step * log(beta)), which float64 carries to 1e-13.

It is the second launch of the norm, and the only one besides the update where there is none. Every tensor has a step of
its own, as in torch: one without a gradient stays behind. Nothing is read by the host, so all of it may be captured in
a CUDA graph.
Cost: 8 B a chunk and 60 B a tensor; a few microseconds.

Options come as float64 (1 + num_groups, 8), here called ``values``. Row 0 holds what all groups share (the columns
``MAX_NORM``, ``EMA_MOMENTUM``), row 1 + g the options of group g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import BLOCK, LAUNCH
from .grad_norm import finish_norm

NUM_VALUES = 8
MAX_NORM, EMA_MOMENTUM = 0, 1
LR, WEIGHT_DECAY = 0, 1
MOMENTUM, DAMPENING = 2, 3  # of SGD
BETA1, BETA2, EPS, LOG_BETA1, LOG_BETA2 = 2, 3, 4, 5, 6  # of Adam


def prepare_reference(
    steps: Sequence[float], lr: float, betas: tuple[float, float], *, found_inf: bool = False
) -> list[tuple[float, float, float]]:
    """(step, step_size, denom_bias) of each tensor after one call, for one group in which all have gradients."""
    after = [step if found_inf else step + 1 for step in steps]
    return [(step, lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)) for step in after]


@triton.jit
def options_at(values, group):
    """The row of a parameter group."""
    return values + (1 + group) * 8


@triton.jit
def _advance(grads, groups, steps, bias, values, num_tensors, by, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, num_tensors, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < num_tensors
        has_grad = tl.load(grads + t, mask=inside, other=0) != 0
        where = tl.load(steps + t, mask=inside, other=0)
        inside = inside & (where != 0)
        step_ptr = where.to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=inside, other=1.0)
        step += tl.where(has_grad, by, 0.0)
        tl.store(step_ptr, step, mask=inside)
        if BIAS:
            options = options_at(values, tl.load(groups + t, mask=inside, other=0))
            lr = tl.load(options, mask=inside, other=0.0)
            log_beta1 = tl.load(options + 5, mask=inside, other=-1.0)
            log_beta2 = tl.load(options + 6, mask=inside, other=-1.0)
            exponent = step.to(tl.float64)
            step_size = lr / (1.0 - tl.exp(exponent * log_beta1))
            denom_bias = tl.sqrt(1.0 - tl.exp(exponent * log_beta2))
            tl.store(bias + 2 * t, step_size.to(tl.float32), mask=inside)
            tl.store(bias + 2 * t + 1, denom_bias.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["num_partials", "num_tensors"])
def _prepare_kernel(
    partials,
    num_partials,
    scalars,
    grads,
    groups,
    steps,
    bias,
    values,
    num_tensors,
    NORM: tl.constexpr,
    SKIP: tl.constexpr,
    STEPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = 1.0
    if NORM:
        found_inf = finish_norm(partials, num_partials, values, scalars, BLOCK)
        if SKIP:
            by = 1.0 - found_inf
    if STEPS:
        _advance(grads, groups, steps, bias, values, num_tensors, by, BIAS, BLOCK)


def launch_prepare(
    scalars: Tensor,
    grads: Tensor,
    groups: Tensor,
    values: Tensor,
    *,
    partials: Tensor | None = None,
    steps: Tensor | None = None,
    bias: Tensor | None = None,
    skip_nonfinite: bool = False,
    block: int = BLOCK,
) -> None:
    """One program.

    Args:
        scalars: float32 (3,): grad_norm, clip_coef, found_inf; written if there are ``partials``.
        grads: int64 (num_tensors,) addresses; 0: no gradient, the step stays.
        groups: int64 (num_tensors,): parameter group of each.
        values: float64 (1 + num_groups, 8), see above.
        partials: float64 (num_chunks,): sums of squares; None: no norm.
        steps: int64 (num_tensors,): addresses of float32 step counts, 0: none; None: nothing is counted.
        bias: float32 (num_tensors, 2), gets step_size and denom_bias; None: they are not wanted.
        skip_nonfinite: leave the steps alone where the norm is not finite; wants ``partials``.
    """
    if skip_nonfinite and partials is None:
        raise ValueError("skip_nonfinite wants partials: a step is skipped for its norm")
    _prepare_kernel[(1,)](
        scalars if partials is None else partials,
        0 if partials is None else len(partials),
        scalars,
        grads,
        groups,
        grads if steps is None else steps,
        scalars if bias is None else bias,
        values,
        len(grads),
        NORM=partials is not None,
        SKIP=skip_nonfinite,
        STEPS=steps is not None,
        BIAS=bias is not None,
        BLOCK=block,
        **LAUNCH,
    )


def values_tensor(num_groups: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros of the shape that the kernels want their options in."""
    return torch.zeros(1 + num_groups, NUM_VALUES, dtype=torch.float64, device=device)
