"""Averages alone, against float64 and MMCV's two passes."""

from __future__ import annotations

import math

import pytest
import torch
from fastrunner.kernels.ema import ema_, ema_reference
from kernel_tables import BLOCK, CHUNK, assert_near, many


@pytest.mark.parametrize("average_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [1e-4, 1.0])
def test_averages(device: torch.device, dtype: torch.dtype, average_dtype: torch.dtype, momentum: float) -> None:
    values, averages = many(device, dtype), many(device, average_dtype)
    exact = [a.double() * (1 - momentum) + momentum * v.double() for a, v in zip(averages, values, strict=True)]
    ema_(averages, values, torch.tensor(momentum, dtype=torch.float64, device=device), chunk=CHUNK, block=BLOCK)
    for average, expected in zip(averages, exact, strict=True):
        assert_near(average, expected, roundings=2)


def test_torchs_bits(device: torch.device) -> None:
    """MMCV's operations: the product is rounded before the sum."""
    values, averages = many(device), many(device)
    expected = ema_reference(averages, values, 0.25)  # a power of 2: 1 - m is exact in float32
    ema_(averages, values, torch.tensor(0.25, device=device), chunk=CHUNK, block=BLOCK)
    for average, other in zip(averages, expected, strict=True):
        assert torch.equal(average, other)


def test_momentum_zero_leaves_the_average_alone_whatever_the_value(device: torch.device) -> None:
    average, value = torch.ones(700, device=device), torch.full((700,), math.inf, device=device)
    ema_([average], [value], torch.zeros((), device=device), chunk=CHUNK, block=BLOCK)
    assert torch.equal(average, torch.ones(700, device=device))


def test_layouts(device: torch.device) -> None:
    value = torch.randn(4, 3, 5, 5, device=device).to(memory_format=torch.channels_last)
    average = torch.zeros_like(value)
    ema_([average], [value], torch.ones((), device=device), chunk=CHUNK, block=BLOCK)
    assert torch.equal(average, value)


def test_bad_input() -> None:
    one = torch.zeros(2)
    with pytest.raises(ValueError, match="differ in length"):
        ema_([one], [], torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"tensor 0: shape \(3,\)"):
        ema_([one], [torch.zeros(3)], torch.tensor(0.5))
    for momentum in (torch.zeros(2), torch.tensor(1), torch.zeros((), device="meta")):
        with pytest.raises(ValueError, match="one floating point element"):
            ema_([one], [torch.zeros(2)], momentum)
    ema_([], [], torch.tensor(0.5))
