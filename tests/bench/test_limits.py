"""Limits and needs against formulas; the bottleneck of made-up iterations. No time is asserted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastrunner import supervised
from fastrunner.bench.limits import CHOICES, WHOLE, diagnose, empty_loop, limit_s, measure_limits, needs, quantity

MACHINE = {
    "stream_bytes_per_s": 1e10,
    "flops_per_s": {"float32": 1e11, "bfloat16": 3e11},
    "empty_loop_s": 1e-8,
    "operation_s": 1e-6,
}


def test_needs_of_a_linear_layer():
    """Forward 2 N I O; backward the weights' gradient, and none for the inputs: 4 N I O. SGD with momentum: the norm
    reads g, then p, g and the momentum are read, p and the momentum written: 6 x 4 bytes."""
    model = supervised(nn.Linear(5, 7), nn.MSELoss())
    batch = dict(img=torch.rand(3, 5), gt_label=torch.rand(3, 7))
    found = needs(model, batch, dict(type="SGD", lr=0.1, momentum=0.9))
    assert found["flops"] == 4 * 3 * 5 * 7
    assert found["update_bytes"] == 24 * (5 * 7 + 7)
    assert needs(model, batch, dict(type="FusedAdamW", lr=0.1))["update_bytes"] == 32 * (5 * 7 + 7)
    assert needs(model, batch, dict(type="SGD", lr=0.1))["update_bytes"] == 16 * (5 * 7 + 7)
    assert all(p.grad is None for p in model.parameters())


def test_needs_of_a_frozen_model():
    model = supervised(nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)), nn.MSELoss())
    found = needs(model, dict(img=torch.rand(3, 4), gt_label=torch.rand(3, 2)), dict(type="SGD", lr=0.1))
    assert found["num_parameters"] == 4 * 2 + 2


def test_operations_are_counted():
    """Forward: t (of the weights), addmm, mse_loss; backward: ones_like, mse_loss_backward, t, mm, t, sum, view, ..."""
    linear = supervised(nn.Linear(2, 2), nn.MSELoss())
    deeper = supervised(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.MSELoss())
    batch, sgd = dict(img=torch.rand(3, 2), gt_label=torch.rand(3, 2)), dict(type="SGD", lr=0.1)
    one, two = (needs(model, batch, sgd)["operations"] for model in (linear, deeper))
    assert 5 < one < two < 2.5 * one


def test_measured_limits_are_there():
    threads = torch.get_num_threads()
    found = measure_limits(torch.device("cpu"), threads=1)
    assert found["stream_bytes_per_s"] > 0
    assert all(rate > 0 for rate in found["flops_per_s"].values())
    assert empty_loop(1000) > 0
    assert found["operation_s"] > 0
    assert torch.get_num_threads() == threads


def test_quantities():
    assert [quantity(value, "B") for value in (0.0, 999.0, 999.9, 1728.0, 1.07e11)] == [
        "0 B", "999 B", "1 kB", "1.73 kB", "107 GB",
    ]  # fmt: skip


def test_limit():
    need = {"flops": 2e8, "update_bytes": 1e7}
    assert limit_s(MACHINE, need) == {"arithmetic": 2e-3, "memory": 1e-3, "loop": 1e-8}


@pytest.mark.parametrize(
    ("need", "iter_s", "parts", "bottleneck"),
    [
        ({"flops": 2e8, "update_bytes": 1e6, "operations": 100}, 3e-3, None, "arithmetic"),
        ({"flops": 1e7, "update_bytes": 2e7, "operations": 100}, 3e-3, None, "memory"),
        ({"flops": 1e5, "update_bytes": 1e3, "operations": 800}, 1e-3, None, "overhead"),
        ({"flops": 1e8, "update_bytes": 1e6, "operations": 100}, 9e-3, {"data": 6e6, "hooks": 1e3}, "data"),
        ({"flops": 1e7, "update_bytes": 1e6, "operations": 9}, 5e-3, {"hooks": 2e6, "logging": 1e6}, "hooks"),
    ],
)
def test_bottleneck(need, iter_s, parts, bottleneck):
    found = diagnose(MACHINE, need, iter_s, parts)
    assert found["bottleneck"] == bottleneck
    assert found["advice"] == CHOICES[bottleneck]
    assert sum(found["spent_s"].values()) == pytest.approx(iter_s, rel=1e-9)
    assert found["share"] == pytest.approx(sum(limit_s(MACHINE, need).values()) / iter_s)
    assert f"bottleneck: {bottleneck}" in found["sentences"][2]
    assert diagnose(MACHINE, need, iter_s, parts, whole=True)["advice"] == (
        WHOLE if bottleneck == "overhead" else CHOICES[bottleneck]
    )
    assert found["mfu"] == pytest.approx(need["flops"] / MACHINE["flops_per_s"]["float32"] / iter_s)
