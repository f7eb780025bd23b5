"""Resizing in the compiled core, inside a DALI pipeline, on DALI's threads.

For 224 x 224 of a photograph's window DALI's own resize takes 0.9 ms an image and laying it out another 0.1 to 0.3;
the core does both, mirroring included, in 0.15 (``csrc/image_resize.cpp``). Decoding takes 0.45.

DALI has an operator that calls functions by their address, ``NumbaFuncImpl``: its plugin for numba is the public face,
and compiles for seconds. What the addresses are called with is known of DALI 2; another one resizes by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch  # noqa: F401  # before the core: it runs on torch's OpenMP

from ..._core import dali_resize
from .inputs import image_channels
from .runtime import import_dali


def resize(image: Any, size: tuple[int, int], mirror: Any, *, planar: bool) -> Any:
    """A node: uint8 images (H, W, C) of any size -> uint8, (``*size``, C), or with ``planar`` (C, ``*size``).

    Triangular filter, widened where an image shrinks, as DALI's and Pillow's; at most 1 of 255 away from Pillow's.

    Args:
        mirror: node, int32 scalar: 0, or the image is mirrored left to right.
    """
    _, fn, types = import_dali()
    channels = image_channels()
    shape = [channels, *size] if planar else [*size, channels]
    setup, run_planar, run_interleaved = dali_resize()
    call = _operator()(
        setup_fn=setup,
        run_fn=run_planar if planar else run_interleaved,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.UINT8, types.INT32],
        outs_ndim=[3],
        ins_ndim=[3, 3, 0],
        batch_processing=False,
    )
    return fn.reshape(
        call(fn.constant(idata=[0], shape=shape, dtype=types.UINT8), image, mirror), layout="CHW" if planar else "HWC"
    )


def can_resize() -> bool:
    """Whether this DALI calls functions as we know it, and the images have as many channels as the core takes."""
    import_dali()
    import nvidia.dali

    return str(nvidia.dali.__version__).startswith("2.") and 1 <= image_channels() <= 4


@functools.cache
def _operator() -> Any:
    from nvidia.dali import ops

    make: Any = ops.python_op_factory  # type: ignore[attr-defined]  # DALI's stubs leave it out
    return make("CoreResize", "NumbaFunction", "NumbaFuncImpl", generated=False)
