"""Crop windows: inside, as large as asked for, distributed as torchvision's."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrunner.data.crops import NUM_UNIFORMS, RATIO, SCALE, check_crop, random_resized_crop
from fastrunner.data.rng import uniforms


def torchvision_window(height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision 0.20, with Python's generator."""
    for _ in range(10):
        target = height * width * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    ratio = width / height
    if ratio < min(RATIO):
        w, h = width, round(width / min(RATIO))
    elif ratio > max(RATIO):
        h, w = height, round(height * max(RATIO))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(320, 500), (128, 128), (60, 700)])
def test_distributed_as_torchvisions(height, width):
    n = 4000
    sizes = np.full((n, 2), (height, width))
    ours = random_resized_crop(uniforms(0, 0, np.arange(n), NUM_UNIFORMS), sizes).astype(float)
    theirs = np.array([torchvision_window(height, width) for _ in range(n)], dtype=float)
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        at = np.unique(np.concatenate([a, b]))
        distance = np.abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / n
        assert distance < 1.95 * math.sqrt(2 / n)  # two-sample Kolmogorov-Smirnov, p = 0.001; seeds are fixed


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
    low=st.floats(1e-6, 1.0),
    ratio=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
)
@settings(max_examples=60, deadline=None)
def test_always_inside_and_never_empty(sizes, seed, low, ratio):
    array = np.array(sizes)
    uniform = uniforms(seed, 0, np.arange(len(sizes)), NUM_UNIFORMS)
    uniform[0] = 1 - 2.0**-53  # the largest that can be drawn
    windows = random_resized_crop(uniform, array, scale=(low, 1.0), ratio=(min(ratio), max(ratio)))
    assert windows.dtype == np.int32
    top, left, height, width = windows.T
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] >= 1).all()
    assert (top + height <= array[:, 0]).all()
    assert (left + width <= array[:, 1]).all()


def test_area_and_aspect_are_within_their_bounds():
    n, side = 3000, 1000
    windows = random_resized_crop(
        uniforms(3, 1, np.arange(n), NUM_UNIFORMS), np.full((n, 2), side), scale=(0.3, 0.6), ratio=(0.5, 2.0)
    )
    height, width = windows[:, 2], windows[:, 3]
    assert (height * width / side**2).min() > 0.3 - 0.002  # a side is rounded by half of 1/1000 at most
    assert (height * width / side**2).max() < 0.6 + 0.002
    assert (width / height).min() > 0.5 * (1 - 0.002)
    assert (width / height).max() < 2 * (1 + 0.002)


@pytest.mark.parametrize(
    ("scale", "ratio", "says"),
    [
        ((0.0, 1.0), RATIO, "scale must be shares"),
        ((0.5, 0.2), RATIO, "scale must be shares"),
        ((0.5, 1.1), RATIO, "scale must be shares"),
        ((float("nan"), 1.0), RATIO, "scale must be shares"),
        (SCALE, (2.0, 1.0), "ratio must be width over height"),
        (SCALE, (0.0, 1.0), "ratio must be width over height"),
        (SCALE, (1.0, math.inf), "ratio must be width over height"),
    ],
)
def test_bad_bounds(scale, ratio, says):
    with pytest.raises(ValueError, match=says):
        check_crop(scale, ratio)
