"""What the update kernels share: roles of tensors, what a launch is compiled for, and what surrounds each formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import DTYPES, block_for
from .ema import averaged


@dataclass(frozen=True)
class Rows:
    """int64 (num_tensors,) addresses on the device, one row a role; 0 for a tensor that has none, None if none has one.

    ``params`` are what is updated: the float32 masters, where there are some, and then ``lows`` the 16-bit parameters
    that get their rounded values. ``states`` are SGD's (momentum buffers,) or Adam's (exp_avg, exp_avg_sq, and with
    amsgrad max_exp_avg_sq). ``counts`` are float32 step counts. ``groups`` are no addresses but parameter groups.
    """

    params: Tensor
    grads: Tensor
    groups: Tensor
    states: tuple[Tensor, ...] = ()
    averages: Tensor | None = None
    lows: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True)
class Kind:
    """What a launch is compiled for; tensors that differ in it need launches of their own.

    Args:
        param, grad, state, average, low: dtypes by role, as in ``Rows``; None: no such role.
        clip: multiply gradients by clip_coef.
        write_back: store them multiplied.
        skip_nonfinite: leave everything but the averages alone if found_inf is not 0.
        maximize: climb.
    """

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype | None = None
    average: torch.dtype | None = None
    low: torch.dtype | None = None
    clip: bool = False
    write_back: bool = False
    skip_nonfinite: bool = False
    maximize: bool = False

    @property
    def block(self) -> int:
        """Elements at once."""
        return block_for(self.param, self.grad, self.state, self.average, self.low)

    def constants(self) -> dict[str, Any]:
        """The kernels' constants. A role that is missing gets float32, and its pointer is not used."""
        return {
            "P": _dtype(self.param),
            "G": _dtype(self.grad),
            "S": _dtype(self.state),
            "E": _dtype(self.average),
            "LOW": _dtype(self.low),
            "MASTER": self.low is not None,
            "EMA": self.average is not None,
            "CLIP": self.clip,
            "WRITE_BACK": self.clip and self.write_back,
            "SKIP": self.skip_nonfinite,
            "MAXIMIZE": self.maximize,
        }


def _dtype(dtype: torch.dtype | None) -> tl.dtype:
    return tl.float32 if dtype is None else DTYPES[dtype]


@triton.jit
def weights_of_average(values):
    """(momentum, 1 - momentum), each rounded once."""
    weight = tl.load(values + 1)
    return weight.to(tl.float32), (1.0 - weight).to(tl.float32)


@triton.jit
def is_updated(grads, scalars, tensor, SKIP: tl.constexpr):
    """Whether a tensor has a gradient, and this step is not to be skipped."""
    acts = tl.load(grads + tensor) != 0
    if SKIP:
        acts = acts & (tl.load(scalars + 2) == 0.0)
    return acts


@triton.jit
def gradient_block(g_ptr, i, mask, clip_coef, CLIP: tl.constexpr, WRITE_BACK: tl.constexpr, MAXIMIZE: tl.constexpr):
    """A block of gradients in float32, clipped; stored so, where the caller wants that and clipping bites."""
    g = tl.load(g_ptr + i, mask=mask).to(tl.float32)
    if CLIP:
        g = g * clip_coef
        if WRITE_BACK:  # noqa: SIM102 - this one is decided by the compiler
            if clip_coef != 1.0:  # NaN too
                tl.store(g_ptr + i, g.to(g_ptr.dtype.element_ty), mask=mask)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def store_block(p, p_ptr, low_ptr, e_ptr, i, mask, ema_momentum, ema_keep, MASTER: tl.constexpr, EMA: tl.constexpr):
    """A block of updated parameters, rounded ones beside masters, and their average."""
    tl.store(p_ptr + i, p.to(p_ptr.dtype.element_ty), mask=mask)
    if MASTER:
        tl.store(low_ptr + i, p.to(low_ptr.dtype.element_ty), mask=mask)
    if EMA:
        average = tl.load(e_ptr + i, mask=mask).to(tl.float32)
        tl.store(e_ptr + i, averaged(average, p, ema_momentum, ema_keep).to(e_ptr.dtype.element_ty), mask=mask)
