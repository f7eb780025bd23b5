"""Losses, learning rates, gradient norms, weights and averages are mmcv 1.7.2's, bit for bit (golden/values.json)."""

from __future__ import annotations

import pytest
import torch
from golden import scenarios, values

import fastrunner

GOLDEN = scenarios.golden("values")

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="recorded with torch's AVX2 kernels, which fuse multiply and add: other CPUs round differently",
)


@pytest.mark.parametrize("name", values.CASES)
def test_values_are_mmcvs(name):
    assert scenarios.play("values", name, fastrunner) == GOLDEN[name]
