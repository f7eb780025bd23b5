"""Accumulated gradients give mmcv 1.7.2's losses, norms and weights, bit for bit (golden/accumulation.json)."""

from __future__ import annotations

import pytest
import torch
from golden import accumulation, scenarios

import fastrunner

GOLDEN = scenarios.golden("accumulation")

pytestmark = [
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
        reason="recorded with torch's AVX2 kernels, which fuse multiply and add: other CPUs round differently",
    ),
    pytest.mark.filterwarnings("ignore:.*no module of Toy has the attribute fp16_enabled"),
]


def without_scale(rows, scale):
    """Inside a window our gradients have the scale, as mmcv's have on a GPU. A power of two: no digit changes."""
    for row in rows:
        row["grads"] = [grad and [value / scale for value in grad] for grad in row["grads"]]
    return rows


@pytest.mark.parametrize("name", accumulation.CASES)
def test_accumulation_is_mmcvs(name):
    ours = scenarios.play("accumulation", name, fastrunner)
    if name.endswith("accumulated"):
        ours = without_scale(ours, 512.0 if "512" in name else 65536.0)
    assert ours == GOLDEN[name]
