"""An image's resize: Pillow's result, a formula's, the same bits on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch  # noqa: F401  # before the core
from PIL import Image

from fastrunner import _core

SIZES = [
    ((1, 1), (1, 1)),
    ((1, 7), (5, 3)),
    ((3, 2), (16, 31)),
    ((40, 64), (40, 64)),
    ((97, 61), (33, 60)),
    ((200, 333), (7, 224)),
    ((5, 500), (224, 2)),
    ((320, 500), (224, 224)),
]


def pixels(height, width, channels):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def resized(image, size, *, mirror=False, planar=False, isa=None):
    channels = image.shape[2]
    guard = 16
    memory = np.full(guard + size[0] * size[1] * channels + guard, 77, np.uint8)
    out = memory[guard:-guard]
    _core.resize_image(image.ctypes.data, *image.shape[:2], out.ctypes.data, *size, channels, mirror, planar, isa)
    assert (memory[:guard] == 77).all()
    assert (memory[-guard:] == 77).all()
    return out.reshape(channels, *size) if planar else out.reshape(*size, channels)


def along(n_in, n_out):
    """The weights of one side, (n_out, n_in), float64: a triangle around each output position's centre."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    centers = (np.arange(n_out)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1.0 - np.abs((np.arange(n_in) + 0.5 - centers) / support))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_formula(before, after, channels):
    image = pixels(*before, channels)
    rows = np.tensordot(along(before[0], after[0]), image.astype(float), axes=(1, 0))
    exact = np.tensordot(rows, along(before[1], after[1]), axes=(1, 1)).transpose(0, 2, 1)
    # rounded to nearest, of float32 sums: some 2e-5 of 255 before that
    assert np.abs(resized(image, after) - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_pillow(before, after):
    image = pixels(*before, 3)
    theirs = np.asarray(Image.fromarray(image).resize(after[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resized(image, after) - theirs).max() <= 1  # Pillow rounds between the passes


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_every_instruction_set_gives_the_same_bits_in_every_layout(before, after, isa):
    for channels in (1, 2, 3, 4):
        image = pixels(*before, channels)
        plain = resized(image, after, isa="scalar")
        for planar in (False, True):
            for mirror in (False, True):
                got = resized(image, after, mirror=mirror, planar=planar, isa=isa)
                got = got.transpose(1, 2, 0) if planar else got
                np.testing.assert_array_equal(got[:, ::-1] if mirror else got, plain)


def test_extremes_stay_where_they_are():
    for level in (0, 255):
        assert (resized(np.full((101, 53, 3), level, np.uint8), (64, 224)) == level).all()


@pytest.mark.parametrize(
    ("before", "after", "channels"), [((0, 1), (1, 1), 3), ((1, 1), (1, 0), 3), ((1, 1), (1, 1), 5)]
)
def test_bad_sizes(before, after, channels):
    memory = np.zeros(8, np.uint8).ctypes.data
    with pytest.raises(ValueError, match="at least 1, and 1 to 4 channels"):
        _core.resize_image(memory, *before, memory, *after, channels, False, False)
    with pytest.raises(ValueError, match="isa 'sse9' is unknown"):
        _core.resize_image(memory, 1, 1, memory, 1, 1, 3, False, False, "sse9")
