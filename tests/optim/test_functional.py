"""The pure functions do what torch's optimizers, the compiled core and the Triton kernels do, and can be traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastrunner.optim import FusedAdam, FusedAdamW, FusedSGD, functional, update
from fastrunner.optim.gpu_table import GpuTable
from fastrunner.optim.tables import ParamTable

SHAPES = [(), (0,), (1,), (17,), (33, 20)]
STEPS = 4

SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    dict(weight_decay=0.1),
    dict(momentum=0.9, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, maximize=True),
    dict(momentum=0.9, dampening=0.5),
]
ADAM_OPTIONS: list[dict[str, Any]] = [
    {},
    dict(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3),
    dict(maximize=True, betas=(0.0, 0.5)),
    dict(amsgrad=True, weight_decay=0.1),
]
CASES = [
    *((torch.optim.SGD, FusedSGD, dict(lr=0.1, **options)) for options in SGD_OPTIONS),
    *((torch.optim.Adam, FusedAdam, dict(lr=0.1, **options)) for options in ADAM_OPTIONS),
    *((torch.optim.AdamW, FusedAdamW, dict(lr=0.1, **options)) for options in ADAM_OPTIONS),
]
# Rounded in float32 in another order: a few 2**-24 a step at values of order 1.
NEAR = dict(rtol=1e-6, atol=1e-6)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class Pure:
    """An optimizer's loop, written with the functions."""

    def __init__(self, params: list[Tensor], kind: type, options: dict[str, Any], *, tensors: bool) -> None:
        self.params, self.kind, self.options = params, kind, dict(options)
        self.states: list[Any] = [None] * len(params)
        self.count = 0
        self.wrap: Callable[[float], Any] = scalar if tensors else float
        self.options["lr"] = self.wrap(options["lr"])

    def step(self, grads: list[Tensor]) -> None:
        self.count += 1
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if self.kind is torch.optim.SGD:
                self.params[i], self.states[i] = functional.sgd(p, g, self.states[i], **self.options)
                continue
            options = dict(self.options)
            amsgrad = options.pop("amsgrad", False)
            zeros = torch.zeros_like(p)
            m, v, largest = self.states[i] or (zeros, zeros, zeros if amsgrad else None)
            function = functional.adamw if self.kind is torch.optim.AdamW else functional.adam
            found = function(p, g, m, v, self.wrap(self.count), **options, max_exp_avg_sq=largest)
            self.params[i], self.states[i] = found[0], found[1:]


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    for number in range(STEPS):
        for p, g in zip(params, gradients(number), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize(("theirs", "ours", "options"), CASES)
def test_steps_as_torchs(theirs: type, ours: type, options: dict[str, Any], tensors: bool) -> None:
    pure = Pure(start(), theirs, options, tensors=tensors)
    for number in range(STEPS):
        pure.step(gradients(number))
    expected = run(theirs([nn.Parameter(p) for p in start()], **options, foreach=False))
    for p, q in zip(pure.params, expected, strict=True):
        assert p.dtype == torch.float32  # a float64 scalar does not widen a parameter of no dimensions
        torch.testing.assert_close(p, q, **NEAR)


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # Triton's interpreter: masked lanes
@pytest.mark.parametrize("table", [ParamTable, GpuTable])
@pytest.mark.parametrize(("theirs", "ours", "options"), CASES)
def test_steps_as_the_kernels(
    theirs: type, ours: type, options: dict[str, Any], table: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core's loops; and Triton's, interpreted, where there is no GPU."""
    device = torch.device("cuda" if table is GpuTable and torch.cuda.is_available() else "cpu")

    def make(*args: Any, isa: str | None, **kwargs: Any) -> Any:
        return table(*args, **kwargs)

    monkeypatch.setitem(update.TABLES, device.type, make)
    pure = Pure(start(), theirs, options, tensors=True)
    params = [nn.Parameter(p.to(device)) for p in start()]
    optimizer = ours(params, **options)
    for number in range(STEPS):
        pure.step(gradients(number))
        for p, g in zip(params, gradients(number), strict=True):
            p.grad = g.to(device)
        optimizer.step()
    for p, q in zip(pure.params, params, strict=True):
        torch.testing.assert_close(p, q.detach().cpu(), **NEAR)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("wrap", [float, scalar])
def test_clip_as_torchs(max_norm: float, wrap: Callable[[float], Any]) -> None:
    grads = [g.double() if i % 2 else g for i, g in enumerate(gradients(0))]
    clipped, norm = functional.clip(grads, wrap(max_norm))
    others = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for other, g in zip(others, grads, strict=True):
        other.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_(others, max_norm)
    torch.testing.assert_close(norm, expected.float(), rtol=1e-6, atol=0)
    for g, other in zip(clipped, others, strict=True):
        torch.testing.assert_close(g, other.grad, rtol=1e-6, atol=0)


def test_norm_is_exact_where_torchs_is_not() -> None:
    grads = [torch.full((3_000_000,), 0.1)]
    exact = float(torch.tensor(0.1)) * math.sqrt(3_000_000)
    assert functional.grad_norm(grads).item() == pytest.approx(exact, rel=2**-23)
    assert functional.grad_norm([]).item() == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_norms_that_are_not_finite(bad: float) -> None:
    norm = functional.grad_norm([torch.tensor([1.0, bad])])
    coef = functional.clip_coef(norm, 1.0).item()
    assert coef == 0.0 if bad == math.inf else math.isnan(coef)


def test_averages_have_mmcvs_bits() -> None:
    value, average = torch.randn(100), torch.randn(100)
    expected = average * (1 - 0.1) + 0.1 * value
    for momentum in (0.1, scalar(0.1)):
        assert torch.equal(functional.ema(average, value, momentum), expected)


@pytest.mark.parametrize("wrap", [float, scalar])
def test_average_with_weight_zero_does_not_look_at_the_value(wrap: Callable[[float], Any]) -> None:
    average = torch.ones(3)
    assert torch.equal(functional.ema(average, torch.full((3,), math.inf), wrap(0.0)), average)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(dtype: torch.dtype) -> None:
    p, g, m, v = (torch.rand(100).to(dtype) for _ in range(4))
    exact = functional.adam(*(t.double() for t in (p, g, m, v)), 3, lr=0.1)
    found = functional.adam(p, g, m, v, 3, lr=0.1)
    for ours, expected in zip(found[:3], exact[:3], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected.to(dtype), rtol=2.0**-7, atol=1e-6)  # one unit in the last place


def test_a_whole_step_can_be_traced_and_reads_nothing() -> None:
    """Over fake tensors, which have no values to read."""

    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, a: Tensor, count: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        (g,), norm = functional.clip([g], 1.0)
        p, m, v, _ = functional.adamw(p, g, m, v, count, lr=lr)
        return p, m, v, functional.ema(a, p, lr), norm

    inputs = [torch.randn(20) for _ in range(3)] + [torch.rand(20), torch.randn(20), scalar(3.0), scalar(0.1)]
    graph = make_fx(step, tracing_mode="fake")(*inputs)
    inputs[5], inputs[6] = scalar(7.0), scalar(0.5)  # not constants of the graph
    for found, expected in zip(graph(*inputs), step(*inputs), strict=True):
        assert torch.equal(found, expected)
