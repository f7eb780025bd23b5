"""uint8 images -> normalised floats in one pass.

    out[n, c, i] = (x[n, c, i] - mean[c]) * inv_std[c]           computed in float32

x: uint8 (N, C, H, W), contiguous or channels_last (decoders give the latter: HWC).  mean, inv_std: float32 (C,), in
0..255 units.  out: (N, C, H, W) in either memory format.
Cost with bfloat16 out: 1 B read + 2 B written = 3 B per value; the reference moves 5 + 8 + 8 + 6 = 27 B.
Results are stored 16 bytes a thread, but from planes to channels_last and where H * W is no multiple of 16. Between the
two formats bytes are read or values written one by one, neighbours by one thread, through the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import LAUNCH, NUM_WARPS, launch_on

THREADS = 32 * NUM_WARPS  # 16 bytes of the result each


def normalize_u8_reference(x: Tensor, mean: Tensor, inv_std: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return ((x.float() - mean[:, None, None]) * inv_std[:, None, None]).to(dtype)


@triton.jit
def _normalize_u8_kernel(
    x_ptr,
    mean_ptr,
    inv_std_ptr,
    out_ptr,
    HW,
    C: tl.constexpr,
    IN_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64) * C * HW  # int64: N * C * H * W may pass 2**31
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if IN_LAST and OUT_LAST:  # one run through memory, channels taking turns
        inside = i < HW * C
        c = i % C
        x = tl.load(x_ptr + image + i, mask=inside, other=0).to(tl.float32)
        y = (x - tl.load(mean_ptr + c)) * tl.load(inv_std_ptr + c)
        tl.store(out_ptr + image + i, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        inside = i < HW
        for c in tl.static_range(C):
            source = i * C + c if IN_LAST else c * HW + i
            target = i * C + c if OUT_LAST else c * HW + i
            x = tl.load(x_ptr + image + source, mask=inside, other=0).to(tl.float32)
            y = (x - tl.load(mean_ptr + c)) * tl.load(inv_std_ptr + c)
            tl.store(out_ptr + image + target, y.to(out_ptr.dtype.element_ty), mask=inside)


def normalize_u8(
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = torch.contiguous_format,
    block: int | None = None,
) -> Tensor:
    """Normalise a batch of images.

    Args:
        x: uint8 (N, C, H, W), contiguous or channels_last; ``hwc.permute(0, 3, 1, 2)`` is the latter.
        mean, inv_std: float32 (C,) on the device of ``x``, in 0..255 units.
        dtype: of the result: float32, bfloat16 or float16.
        memory_format: of the result.
    Returns:
        (N, C, H, W) on the device of ``x``.
    Raises:
        TypeError: ``x`` is not uint8.
        ValueError: ``x`` is not 4-D or in neither memory format, or ``mean`` and ``inv_std`` do not fit it.
    """
    if x.dtype != torch.uint8:
        raise TypeError(f"x must be uint8, got {x.dtype}")
    planes = x.is_contiguous()
    if x.dim() != 4 or not (planes or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"x must be (N, C, H, W), contiguous or channels_last, got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    n, c, h, w = x.shape
    for name, t in (("mean", mean), ("inv_std", inv_std)):
        if t.shape != (c,) or t.dtype != torch.float32 or t.device != x.device:
            raise ValueError(
                f"{name} must be float32 ({c},) on {x.device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    out = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory_format)
    if x.numel():
        block = block or THREADS * 16 // dtype.itemsize
        constants = {"C": c, "IN_LAST": not planes, "OUT_LAST": not out.is_contiguous(), "BLOCK": block}
        length = h * w * (c if constants["IN_LAST"] and constants["OUT_LAST"] else 1)
        with launch_on(x.device):
            grid = (n, triton.cdiv(length, block))
            _normalize_u8_kernel[grid](x, mean.contiguous(), inv_std.contiguous(), out, h * w, **constants, **LAUNCH)
    return out
