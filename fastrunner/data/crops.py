"""Crop windows from uniform numbers, in whole pixels: always inside the image, and never empty.

    area = s * height * width, s uniform in scale          width / height = r, log r uniform in log ratio

for up to ten tries; the first window that fits is taken, its place uniform over all whole-pixel places. If none fits it
is the largest central window whose aspect is within ``ratio``. This is Inception's crop as torchvision has it.
Sources: Szegedy et al. 2014, https://arxiv.org/abs/1409.4842; torchvision.transforms.RandomResizedCrop.get_params.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SCALE = (0.08, 1.0)  # area of a crop, as a share of the image's
RATIO = (3 / 4, 4 / 3)  # width over height of a crop, in pixels
TRIES = 10
NUM_UNIFORMS = 2 * TRIES + 2  # that one window is made of


def check_crop(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raise ValueError unless ``0 < scale[0] <= scale[1] <= 1`` and ``0 < ratio[0] <= ratio[1]``."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be shares of the area, 0 < low <= high <= 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1] < np.inf:
        raise ValueError(f"ratio must be width over height, 0 < low <= high, got {ratio}")


def random_resized_crop(
    uniform: NDArray[np.floating],
    sizes: NDArray[np.integer],
    *,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> NDArray[np.int32]:
    """One window for each image.

    Args:
        uniform: in [0, 1), (n, NUM_UNIFORMS).
        sizes: (n, 2): height and width in pixels, at least 1.
    Returns:
        int32, (n, 4): top, left, height, width.
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    share = scale[0] + (scale[1] - scale[0]) * uniform[:, :TRIES]
    aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * uniform[:, TRIES : 2 * TRIES])
    area = share * height * width
    heights, widths = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    chosen = fits.argmax(axis=1, keepdims=True)
    crop_height = np.take_along_axis(heights, chosen, axis=1)
    crop_width = np.take_along_axis(widths, chosen, axis=1)
    # floor(u * places) < places also in floats: u is at most 1 - 2**-53, and places far below 2**52
    top = np.floor(uniform[:, -2:-1] * (height - crop_height + 1))
    left = np.floor(uniform[:, -1:] * (width - crop_width + 1))
    windows = np.concatenate([top, left, crop_height, crop_width], axis=1)
    none = ~fits.any(axis=1)
    if none.any():
        windows[none] = _central(height[none], width[none], ratio)
    return windows.astype(np.int32)


def _central(
    height: NDArray[np.float64], width: NDArray[np.float64], ratio: tuple[float, float]
) -> NDArray[np.float64]:
    """The largest central window of each image with an aspect within ``ratio``: (n, 4)."""
    aspect = np.clip(width / height, *ratio)
    crop_height = np.maximum(1, np.rint(np.minimum(height, width / aspect)))
    crop_width = np.maximum(1, np.rint(np.minimum(width, height * aspect)))
    return np.concatenate([(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width], axis=1)
