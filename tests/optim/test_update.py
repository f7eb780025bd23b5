"""The engine behind the fused optimizers: it runs torch's own, too, and reads many tensors in several threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastrunner.optim import EmaTerm, FusedAdamW, FusedSGD
from fastrunner.optim.update import Update, algorithm_of

KINDS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=False),
}


def parameters(sizes: tuple[int, ...] = (0, 1, 17, 4_097)) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=random)) for n in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_optimizers_take_turns_with_their_own_step(kind: str, nearest_roots: None) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = KINDS[kind](ours), KINDS[kind](theirs)
    algorithm = algorithm_of(optimizer)
    assert algorithm is not None
    update = Update(algorithm, masters=False)
    for number in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        if number in (2, 3):
            optimizer.step()
        else:
            update.step(optimizer.param_groups, optimizer.state)
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            assert optimizer.state[p].keys() == reference.state[q].keys()
    assert update.rest == {}


def test_16_bit_parameters_of_torchs_optimizers_stay_torchs() -> None:
    param, other = (nn.Parameter(torch.linspace(-1, 1, 50).bfloat16()) for _ in range(2))
    optimizer, reference = KINDS["adam"]([param]), KINDS["adam"]([other])
    update = Update(algorithm_of(optimizer), masters=False)  # type: ignore[arg-type]
    for _ in range(3):
        param.grad, other.grad = torch.ones_like(param), torch.ones_like(other)
        update.step(optimizer.param_groups, optimizer.state)
        reference.step()
    assert torch.equal(param, other)
    assert update.rest == {(0, 0): "is of 16 bits"}


def test_only_the_classes_themselves_are_known() -> None:
    class Mine(torch.optim.Adam):
        pass

    params = parameters()
    assert algorithm_of(Mine(params)) is None
    assert algorithm_of(torch.optim.RMSprop(params)) is None
    assert algorithm_of(object()) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_many_tensors_are_read_by_several_threads(threads: int, nearest_roots: None) -> None:
    """Beyond a thousand; with odd ones among them, which only Python can read, and one that changes on the way."""
    torch.set_num_threads(threads)
    sizes = tuple(1 if i % 97 == 0 else 3 + i % 5 for i in range(1_500))
    ours, theirs = parameters(sizes), parameters(sizes)
    averages = [p.detach().clone() for p in ours]
    optimizer, reference = FusedAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    term = EmaTerm(ours, averages, 0.5)
    expected = [p.detach().clone() for p in theirs]
    for number in range(4):
        if number == 2:
            for p in (ours[700], theirs[700]):
                p.data = torch.full_like(p, 7.0)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        optimizer.step(ema=term, zero=True)
        reference.step()
        EmaTerm([q.detach() for q in theirs], expected, 0.5).update()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averages, expected, strict=True))
    assert all(p.grad is None for p in ours)


def test_stale_graphs_fail_with_either_way_of_reading(reader: str) -> None:
    """Versions of parameters, averages and written gradients move; those of what was left alone do not."""
    used, idle = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    averages = [torch.ones(5), torch.ones(5)]
    optimizer, term = FusedSGD([used, idle], lr=0.1), EmaTerm([used, idle], averages, 0.5)
    for clip in (None, 0.5):
        used.grad = torch.ones(5)
        before = [t._version for t in (used, idle, *averages, used.grad)]
        optimizer.step(ema=term, max_norm=clip)
        moved = [t._version > v for t, v in zip((used, idle, *averages, used.grad), before, strict=True)]
        assert moved == [True, False, True, True, clip is not None]
