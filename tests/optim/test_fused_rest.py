"""What the compiled core does not take: torch's functional SGD does it, with the same result, and it is said why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrunner.optim import FusedSGD
from fastrunner.optim.tables import shared_memory


class Tagged(Tensor):
    """A tensor subclass: its memory may not be what it seems."""


def with_gaps() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 40).view(10, 4)[:, ::2])


def odd_gradient(p: Tensor) -> Tensor:
    return torch.linspace(0, 1, p.numel()).view(*reversed(p.shape)).t()


def plain_gradient(p: Tensor) -> Tensor:
    return torch.linspace(0.5, 1, p.numel()).view(p.shape).to(p.dtype)


OTHER = "is not of float32, bfloat16 or float16"
CASES: dict[str, tuple[Callable[[], nn.Parameter], Callable[[Tensor], Tensor], str]] = {
    "float64": (lambda: nn.Parameter(torch.linspace(-1, 1, 20).double()), plain_gradient, OTHER),
    "complex": (
        lambda: nn.Parameter(torch.complex(torch.linspace(-1, 1, 20), torch.linspace(1, 2, 20))),
        lambda p: torch.complex(torch.linspace(0, 1, 20), torch.linspace(1, 3, 20)),
        OTHER,
    ),
    "gaps": (with_gaps, plain_gradient, "is not dense: its elements overlap or have gaps between them"),
    "strides": (
        lambda: nn.Parameter(torch.linspace(-1, 1, 20).view(5, 4)),
        odd_gradient,
        "has a gradient that has another shape or other strides than its parameter",
    ),
    "subclass": (
        lambda: nn.Parameter(torch.linspace(-1, 1, 20).as_subclass(Tagged)),
        lambda p: plain_gradient(p).as_subclass(Tagged),
        "is not exactly a torch.Tensor or torch.nn.Parameter",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_as_torch_and_said_why(case: str) -> None:
    make, gradient, why = CASES[case]
    options: dict[str, Any] = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    plain, odd = nn.Parameter(torch.ones(100)), make()
    others = [nn.Parameter(torch.ones(100)), make()]
    groups: list[dict[str, Any]] = [{"params": [plain]}, {"params": [odd], "lr": 0.05}]
    other_groups: list[dict[str, Any]] = [{"params": others[:1]}, {"params": others[1:], "lr": 0.05}]
    ours, theirs = FusedSGD(groups, **options), torch.optim.SGD(other_groups, foreach=False, **options)
    for _ in range(3):
        for p in (plain, odd, *others):
            p.grad = plain_gradient(p) if p.shape == plain.shape else gradient(p)
        ours.step()
        theirs.step()
        assert ours.rest == {(1, 0): why}
        assert torch.equal(plain, others[0])
        assert torch.equal(odd, others[1])
        assert torch.equal(ours.state[odd]["momentum_buffer"], theirs.state[others[1]]["momentum_buffer"])


@pytest.mark.parametrize("write_back", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_counts_in_the_norm_and_is_clipped(case: str, write_back: bool) -> None:
    make, gradient, _ = CASES[case]
    plain, odd = nn.Parameter(torch.ones(100)), make()
    params, others = [plain, odd], [nn.Parameter(torch.ones(100)), make()]
    ours, theirs = FusedSGD(params, lr=0.5), torch.optim.SGD(others, lr=0.5, foreach=False)
    for p in (*params, *others):
        p.grad = plain_gradient(p) if p.shape == plain.shape else gradient(p)
    grads = [p.grad for p in params]
    before = [grad.clone() for grad in grads if grad is not None]
    exact = math.sqrt(sum(float(g.abs().double().square().sum()) for g in before))
    grad_norm = ours.clipped_step(0.25 * exact, write_back=write_back)
    torch.nn.utils.clip_grads_with_norm_(others, 0.25 * exact, grad_norm)
    theirs.step()
    assert float(grad_norm) == pytest.approx(exact, rel=1e-6)
    assert torch.equal(plain, others[0])
    torch.testing.assert_close(odd, others[1], rtol=1e-6, atol=0)
    for grad, unclipped, other in zip(grads, before, others, strict=True):
        assert grad is not None
        torch.testing.assert_close(grad, other.grad if write_back else unclipped, rtol=1e-6, atol=0)


def embedding() -> tuple[nn.Embedding, FusedSGD]:
    model = nn.Embedding(10, 4, sparse=True)
    return model, FusedSGD(model.named_parameters(), lr=0.5, momentum=0.9)


def test_sparse_gradients_as_torch() -> None:
    ours, optimizer = embedding()
    theirs = nn.Embedding(10, 4, sparse=True)
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9, foreach=False)
    for _ in range(3):
        for model, step in ((ours, optimizer.step), (theirs, reference.step)):
            model.zero_grad()
            model(torch.tensor([1, 3, 3])).square().sum().backward()
            step()
    assert torch.equal(ours.weight, theirs.weight)
    assert optimizer.rest == {(0, 0): "has a gradient that has no plain memory (sparse, meta or complex-conjugated)"}


def test_sparse_gradients_cannot_be_clipped_nor_decayed_and_nothing_is_written() -> None:
    model, optimizer = embedding()
    before = model.weight.detach().clone()
    model(torch.tensor([1, 3, 3])).square().sum().backward()
    with pytest.raises(TypeError, match=r"parameter group 0, parameter 0 \('weight'\): its gradient is sparse.*dense"):
        optimizer.clipped_step(1.0)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match=r"parameter 0 \('weight'\): torch.optim.SGD cannot update it either"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_shared_memory_is_updated_in_torchs_order() -> None:
    """Two parameters in one memory: torch does one after the other, and the second sees what the first wrote."""

    def params() -> list[nn.Parameter]:
        memory = torch.linspace(-1, 1, 200_000)
        return [nn.Parameter(memory[:150_000]), nn.Parameter(memory[50_000:]), nn.Parameter(torch.ones(10))]

    ours, theirs = params(), params()
    optimizer = FusedSGD(ours, lr=0.1, weight_decay=0.5)
    reference = torch.optim.SGD(theirs, lr=0.1, weight_decay=0.5, foreach=False)
    for p in (*ours, *theirs):
        p.grad = torch.ones_like(p)
    optimizer.step()
    reference.step()
    assert optimizer.rest == dict.fromkeys([(0, 0), (0, 1)], "shares memory with another parameter")
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_the_same_parameter_twice_is_updated_twice() -> None:
    param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = FusedSGD([param, param], lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        reference = torch.optim.SGD([other, other], lr=0.1, momentum=0.9, foreach=False)
    for _ in range(2):
        param.grad, other.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        reference.step()
        assert torch.equal(param, other)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 4), (4, 8), (8, 12)], []),  # neighbours
        ([(0, 8), (4, 12)], [0, 1]),
        ([(0, 12), (1, 2), (6, 8), (12, 14)], [0, 1, 2]),  # the first reaches over the second to the third
        ([(5, 5), (0, 10)], []),  # without elements
    ],
)
def test_shared_memory(spans: list[tuple[int, int]], expected: list[int]) -> None:
    memory = torch.zeros(20)
    params = [memory[start:end] for start, end in spans]
    assert shared_memory(params) == {id(params[i]) for i in expected}


@pytest.mark.parametrize("write_back", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_a_shared_gradient_is_clipped_once(late: bool, write_back: bool) -> None:
    """torch.autograd.grad gives two summands one tensor; both are to get it, clipped to the norm that was asked for."""
    params = [nn.Parameter(torch.zeros(50_000)) for _ in range(3)]
    optimizer = FusedSGD(params, lr=1.0)
    if late:  # the table has been built without an inkling
        for p in params:
            p.grad = torch.zeros(50_000)
        optimizer.clipped_step(1.0)
    shared, same = torch.autograd.grad((params[0] + params[1]).mul(2.0).sum(), params[:2])
    assert shared is same, "torch copies it now: nothing is shared, and the test can go"
    for p, grad in zip(params, (shared, shared, torch.ones(50_000)), strict=True):
        p.grad = grad
    grad_norm = float(optimizer.clipped_step(1.0, write_back=write_back))
    assert grad_norm == pytest.approx(math.sqrt(50_000 * (4 + 4 + 1)), rel=1e-6)
    for p, value in zip(params, (2.0, 2.0, 1.0), strict=True):
        torch.testing.assert_close(p.detach(), torch.full((50_000,), -value / grad_norm))
    torch.testing.assert_close(shared, torch.full((50_000,), 2.0 / grad_norm if write_back else 2.0))
    assert optimizer.rest == dict.fromkeys([(0, 0), (0, 1)], "shares its gradient with another parameter")


def test_lazily_negated_gradient() -> None:
    """Autograd leaves such a gradient to a parameter of one element in complex maths, and DLPack does not tell."""
    param, other = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
    for p in (param, other):
        torch.autograd.backward(torch.complex(torch.tensor([1.0]), p).conj().abs().sum())
    assert param.grad is not None
    assert param.grad.is_neg(), "torch resolves it now: the test and the check in torch_reader.cpp can go"
    optimizer = FusedSGD([param], lr=0.1)
    optimizer.step()
    torch.optim.SGD([other], lr=0.1).step()
    assert torch.equal(param, other)
    assert optimizer.rest == {(0, 0): "has a gradient that is a lazily negated view"}


def test_a_parameter_goes_to_the_rest_when_its_gradient_turns_odd() -> None:
    param = nn.Parameter(torch.ones(5, 4))
    optimizer = FusedSGD([param], lr=1.0, momentum=0.5)
    expected, momentum = torch.ones(5, 4), torch.zeros(5, 4)
    for gradient in (torch.ones(5, 4), odd_gradient(param), torch.ones(5, 4)):
        param.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
        momentum = 0.5 * momentum + gradient
        expected = expected - momentum
        torch.testing.assert_close(param.detach(), expected)


def test_momentum_in_another_layout_is_moved_once() -> None:
    """A checkpoint of a contiguous model goes on fast in a channels_last one."""
    param = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = FusedSGD([param], lr=1.0, momentum=0.5)
    values = torch.linspace(0, 1, 48).view(4, 3, 2, 2)
    optimizer.state[param]["momentum_buffer"] = values.clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.rest == {}
    moved = optimizer.state[param]["momentum_buffer"]
    assert moved.stride() == param.stride()
    assert torch.equal(moved, 0.5 * values)


@pytest.mark.parametrize("buffer", [torch.ones(7), "text"])
def test_momentum_of_another_shape_is_refused_by_name(buffer: Any) -> None:
    param = nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = FusedSGD([("fc.bias", param)], lr=1.0, momentum=0.5)
    optimizer.state[param]["momentum_buffer"] = buffer
    with pytest.raises(
        ValueError, match=re.escape("parameter group 0, parameter 0 ('fc.bias'): its momentum_buffer is")
    ):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(5))


def test_momentum_of_another_dtype_as_torch() -> None:
    param, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    ours, theirs = FusedSGD([param], momentum=0.5), torch.optim.SGD([other], momentum=0.5, foreach=False)
    for p, optimizer in ((param, ours), (other, theirs)):
        optimizer.state[p]["momentum_buffer"] = torch.linspace(0, 1, 5, dtype=torch.float64)
        p.grad = torch.ones(5)
        optimizer.step()
    assert torch.equal(param, other)
    assert ours.rest == {(0, 0): "has a momentum buffer that is not float32"}
