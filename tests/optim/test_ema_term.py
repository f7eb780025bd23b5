"""The average that is taken with the update has the bits of MMCV's two passes after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastrunner.optim import EmaTerm, FusedSGD

SIZES = (0, 1, 15, 16, 17, 63, 4_097, 40_000)


def foreach(averages: list[Tensor], params: list[Tensor], m: float) -> None:
    torch._foreach_mul_(averages, 1 - m)
    torch._foreach_add_(averages, params, alpha=m)


@pytest.mark.parametrize("zero", [False, True])
def test_average_of_every_parameter_after_the_update(zero: bool) -> None:
    """Frozen parameters, ones without a gradient, and ones that are not in the optimizer are averaged, too."""
    params = [nn.Parameter(torch.randn(n)) for n in SIZES]
    frozen, idle = nn.Parameter(torch.randn(100), requires_grad=False), nn.Parameter(torch.randn(100))
    stranger = nn.Parameter(torch.randn(3, 4))
    everything: list[Tensor] = [*params, frozen, idle, stranger]
    averages, expected = (
        [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in everything] for _ in range(2)
    )
    optimizer = FusedSGD([*params, frozen, idle], lr=0.1, momentum=0.9)
    term = EmaTerm(everything, averages, 0.5)
    for m in (0.5, 0.0002, 1 / 3):
        for p in (*params, stranger):
            p.grad = torch.randn_like(p)
        term.momentum = m
        optimizer.step(max_norm=1.0, ema=term, zero=zero)
        foreach(expected, [p.detach() for p in everything], m)
        for a, b in zip(averages, expected, strict=True):
            assert torch.equal(a, b)
        assert all((p.grad is None) == zero for p in params)
        assert stranger.grad is not None


def test_average_only_where_it_is_asked_for() -> None:
    param = nn.Parameter(torch.zeros(2))
    average = torch.zeros(2)
    optimizer, term = FusedSGD([param], lr=1.0), EmaTerm([param], [average], 0.5)
    seen = []
    for ema in (None, term, None, term):
        param.grad = torch.full((2,), -1.0)
        optimizer.step(ema=ema)
        seen.append(average[0].item())
    assert seen == [0.0, 1.0, 1.0, 2.5]


def test_averages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 parameters, 1"):
        EmaTerm([torch.ones(2), torch.ones(3)], [torch.ones(2)], 0.5)
    with pytest.raises(ValueError, match=r"average 1 has shape \(2,\), its parameter has shape \(3,\)"):
        EmaTerm([torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(2)], 0.5)
