"""FusedAdam and FusedAdamW: torch's formula with the nearest square root, for any ISA; no less exact than torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrunner import OPTIMIZERS, _core, build_optimizer
from fastrunner.optim import EmaTerm, FusedAdam, FusedAdamW, FusedSGD

# Around one lane, one register, one round of lanes; a chunk and a tail; nothing.
SIZES = (0, 1, 15, 16, 17, 63, 4_097, 16_385)
LARGE = 1_000_003
KEYS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
PAIRS = {"adam": (FusedAdam, torch.optim.Adam), "adamw": (FusedAdamW, torch.optim.AdamW)}


def parameter(values: Tensor, offset: int = 0) -> nn.Parameter:
    """A parameter with these values, ``offset`` floats behind the start of its memory: not aligned."""
    memory = torch.empty(values.numel() + offset)
    return nn.Parameter(memory[offset:].view(values.shape).copy_(values))


def assert_same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())  # NaN equals NaN, 0 equals -0


def state_of(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> list[Tensor]:
    slots = [optimizer.state[p] for p in params if p in optimizer.state]
    return [slot[key] for slot in slots for key in KEYS if key in slot]


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    unit = st.floats(0, 0.99)
    return dict(
        lr=draw(st.floats(0, 1.5, width=32)),
        betas=(draw(st.sampled_from([0.9, 0.0]) | unit), draw(st.sampled_from([0.999, 0.0]) | unit)),
        eps=draw(st.sampled_from([1e-8, 1e-3])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        amsgrad=draw(st.booleans()),
        maximize=draw(st.booleans()),
    )


many = hypothesis.settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


@pytest.mark.parametrize("kind", PAIRS)
@many
@hypothesis.given(data=st.data())
def test_steps_have_the_bits_of_torchs_formula(isa: str, nearest_roots: None, kind: str, data: st.DataObject) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    shapes = data.draw(st.lists(st.lists(st.sampled_from(SIZES), max_size=3), min_size=1, max_size=3).filter(any))
    choices = [data.draw(options()) for _ in shapes]
    ours = [[parameter(torch.randn(n, generator=random), n % 3) for n in sizes] for sizes in shapes]
    theirs = [[parameter(p.detach()) for p in params] for params in ours]
    fused_class, torch_class = PAIRS[kind]
    fused = fused_class([{"params": p, **o} for p, o in zip(ours, choices, strict=True)])
    reference = torch_class([{"params": p, **o} for p, o in zip(theirs, choices, strict=True)], foreach=False)
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    for _ in range(3):
        for p, q in pairs:
            skipped = data.draw(st.integers(0, 4)) == 0
            p.grad = None if skipped else torch.randn(p.shape, generator=random)
            q.grad = None if p.grad is None else p.grad.clone()
        fused.step()
        reference.step()
        assert fused.rest == {}
        assert_same_bits([p for p, _ in pairs], [q for _, q in pairs])
        assert_same_bits(state_of(fused, [p for p, _ in pairs]), state_of(reference, [q for _, q in pairs]))


@pytest.mark.parametrize("kind", PAIRS)
def test_no_less_exact_than_torch(isa: str, kind: str) -> None:
    """Ten steps against float64: the largest error is no larger than torch's."""
    fused_class, torch_class = PAIRS[kind]
    values = torch.randn(LARGE)
    param, other, exact = parameter(values), parameter(values), nn.Parameter(values.double())
    kwargs: dict[str, Any] = dict(lr=0.01, weight_decay=0.1)
    optimizers = [fused_class([param], **kwargs), torch_class([other], **kwargs), torch_class([exact], **kwargs)]
    for _ in range(10):
        grad = torch.randn(LARGE)
        for p, optimizer in zip((param, other, exact), optimizers, strict=True):
            p.grad = grad.to(p.dtype, copy=True)
            optimizer.step()
    ours, theirs = ((p.detach().double() - exact.detach()).abs() for p in (param, other))
    assert float(ours.mean()) <= 1.01 * float(theirs.mean())  # both are rounding: they differ by chance
    assert float(ours.max()) < 10 * 2.0**-22  # |p| < 8: half an ulp is 2**-22 at most, once a step


def trajectory(isa: str, threads: int) -> list[Tensor]:
    """Weights, state, averages and norms of a few clipped steps over many chunks, unaligned."""
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    sizes = (300_001, 17, 0, 70_000, 1, 16_385)
    params = [parameter(torch.randn(n, generator=random), offset=1) for n in sizes]
    averages = [p.detach().clone() for p in params]
    optimizer, term = FusedAdamW(params, lr=0.1), EmaTerm(params, averages, 0.1)
    optimizer._isa = isa
    norms = []
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step(max_norm=100.0, ema=term)
        assert optimizer.grad_norm is not None
        norms.append(optimizer.grad_norm)
    return [*params, *state_of(optimizer, params), *averages, *norms]


def test_same_bits_for_any_isa_and_number_of_threads() -> None:
    first = trajectory("scalar", 1)
    for isa in _core.supported_isas():
        for threads in (1, 2, 3):
            assert_same_bits(trajectory(isa, threads), first)


def test_they_are_registered() -> None:
    model = nn.Linear(2, 2)
    for kind in (FusedSGD, FusedAdam, FusedAdamW):
        assert OPTIMIZERS.get(kind.__name__) is kind
        assert type(build_optimizer(model, dict(type=kind.__name__, lr=0.1))) is kind
    assert build_optimizer(model, dict(type="FusedAdamW")).defaults["weight_decay"] == 1e-2
