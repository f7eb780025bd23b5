"""FusedSGD's arithmetic: torch's bits without clipping, float64's norm with it; for any ISA and number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrunner import _core
from fastrunner.optim import FusedSGD

# Around one lane, one register, one round of lanes, one chunk; several chunks with a tail; nothing.
SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 4_097, 16_383, 16_384, 16_385, 40_000)
# Three OpenMP shares and an odd tail. At this size torch's own norm is off by more than the tolerances here.
LARGE = 1_000_003

Groups = list[dict[str, Any]]


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


def parameter(values: Tensor, offset: int = 0) -> nn.Parameter:
    """A parameter with these values, ``offset`` floats behind the start of its memory: not aligned."""
    memory = torch.empty(values.numel() + offset)
    return nn.Parameter(memory[offset:].view(values.shape).copy_(values) if offset else values.clone())


def copy_groups(groups: Groups) -> Groups:
    return [{**group, "params": [parameter(p.detach()) for p in group["params"]]} for group in groups]


def params_of(groups: Groups) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def torch_sgd(groups: Groups, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, foreach=False, fused=False, **options)


def assert_same_bits(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())  # NaN equals NaN, 0 equals -0


def buffers(optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    return [
        optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
        for p in params_of(optimizer.param_groups)
    ]


numbers = st.floats(0, 1.5, width=32)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.9]) | numbers)
    nesterov = momentum > 0 and draw(st.booleans())
    return dict(
        lr=draw(numbers),
        momentum=momentum,
        nesterov=nesterov,
        dampening=0.0 if nesterov else draw(st.sampled_from([0.0, 0.1]) | numbers),
        weight_decay=draw(st.sampled_from([0.0, 1e-4]) | numbers),
        maximize=draw(st.booleans()),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Groups, list[list[Tensor | None]]]:
    """Parameter groups, and for each of a few steps one gradient (or None) a parameter."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = draw(st.lists(st.lists(st.sampled_from(SIZES), max_size=3), min_size=1, max_size=3).filter(any))
    groups = [
        {
            "params": [parameter(torch.randn(n, generator=random), draw(st.integers(0, 3))) for n in sizes],
            **draw(options()),
        }
        for sizes in shapes
    ]
    steps = [
        [torch.randn(p.shape, generator=random) if draw(st.integers(0, 4)) else None for p in params_of(groups)]
        for _ in range(3)
    ]
    return groups, steps


def set_grads(groups: Groups, grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(params_of(groups), grads, strict=True):
        p.grad = None if grad is None else grad.clone()


# The instruction set is fixed for all examples of a test, which is what the first check doubts; two cores in common use
# are too slow for the others.
many = hypothesis.settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


@many
@hypothesis.given(problem=problems())
def test_unclipped_steps_have_torchs_bits(isa: str, problem: tuple[Groups, list[list[Tensor | None]]]) -> None:
    groups, steps = problem
    other = copy_groups(groups)
    ours, theirs = FusedSGD(groups), torch_sgd(other)
    for grads in steps:
        set_grads(groups, grads)
        set_grads(other, grads)
        ours.step()
        theirs.step()
        assert ours.rest == {}
        assert_same_bits(params_of(groups), params_of(other))
        assert_same_bits(buffers(ours), buffers(theirs))
        assert_same_bits([p.grad for p in params_of(groups)], grads)  # untouched


def test_multiply_and_add_round_once(isa: str) -> None:
    """Values where rounding to double first would end one ulp away: a CPU without the instruction emulates it."""
    ulp = 2.0**-23
    lr = (1 + ulp) * 2.0**-24
    # lr * |g| = 2**-24 - 2**-70: just under half an ulp of p, and exactly half of it once rounded to double.
    values = torch.tensor([1 + ulp, 1 + ulp, -1 - ulp, -1 - ulp])
    param = parameter(values)
    param.grad = torch.tensor([1 - ulp, ulp - 1, 1 - ulp, ulp - 1])
    FusedSGD([param], lr=lr).step()
    assert_same_bits([param], [values])


def norm64(grads: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))


def torch_clip(grads: Sequence[Tensor | None], max_norm: float, grad_norm: Tensor) -> list[Tensor | None]:
    """What torch makes of the gradients when told the norm."""
    params = [nn.Parameter(torch.zeros(0 if g is None else g.shape)) for g in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.clone()
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, grad_norm)
    return [p.grad for p in params]


@many
@hypothesis.given(problem=problems(), max_norm=st.floats(0.01, 300), write_back=st.booleans())
def test_clipped_steps_have_torchs_bits_given_the_norm(
    isa: str, problem: tuple[Groups, list[list[Tensor | None]]], max_norm: float, write_back: bool
) -> None:
    groups, steps = problem
    other = copy_groups(groups)
    ours, theirs = FusedSGD(groups), torch_sgd(other)
    for grads in steps:
        set_grads(groups, grads)
        grad_norm = ours.clipped_step(max_norm, write_back=write_back)
        # A lane sums at most 256 squares in float, 2**-24 each: a relative error under 256 * 2**-25 = 8e-6 even if all
        # roundings went one way. As they do not, 1e-6 is already generous.
        assert float(grad_norm) == pytest.approx(norm64(grads), rel=1e-6)
        clipped = torch_clip(grads, max_norm, grad_norm)
        set_grads(other, clipped)
        theirs.step()
        assert_same_bits(params_of(groups), params_of(other))
        assert_same_bits(buffers(ours), buffers(theirs))
        assert_same_bits([p.grad for p in params_of(groups)], clipped if write_back else grads)


@pytest.mark.parametrize("size", [LARGE, 3_000_001])
def test_norm_is_float64s_where_torchs_is_not(isa: str, size: int) -> None:
    param = nn.Parameter(torch.zeros(size))
    param.grad = torch.randn(size)
    exact = norm64([param.grad])
    theirs = float(torch.nn.utils.get_total_norm([param.grad]))
    ours = float(FusedSGD([param], lr=0.0).clipped_step(1e9))
    assert ours == pytest.approx(exact, rel=1e-7)  # the norm is returned as float32, good to 6e-8
    assert abs(theirs - exact) > 10 * abs(ours - exact)


def test_clipped_sgd_follows_float64(isa: str) -> None:
    """Ten clipped steps against the formula in float64: the error stays near float32's resolution."""
    param = nn.Parameter(torch.randn(LARGE))
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
    p, m = param.detach().double(), torch.zeros(LARGE, dtype=torch.float64)
    for _ in range(10):
        param.grad = torch.randn(LARGE)
        g = param.grad.double()
        g *= min(1.0, 5.0 / (float(g.norm()) + 1e-6))
        d = g + 1e-3 * p
        m = 0.9 * m + d
        p -= 0.1 * (d + 0.9 * m)
        optimizer.clipped_step(5.0)
    # |p| < 8 here: half an ulp is 2**-22 at most, and each step rounds p once.
    assert float((param.detach().double() - p).abs().max()) < 10 * 2.0**-22


def test_clip_and_step_agree_with_torchs_two_calls(isa: str) -> None:
    param, other = nn.Parameter(torch.randn(4_097)), nn.Parameter(torch.empty(4_097))
    other.data.copy_(param.data)
    ours, theirs = FusedSGD([param], lr=0.1, momentum=0.9), torch.optim.SGD([other], lr=0.1, momentum=0.9)
    for _ in range(5):
        param.grad = torch.randn(4_097)
        other.grad = param.grad.clone()
        grad_norm = ours.clipped_step(1.0)
        expected = torch.nn.utils.clip_grad_norm_([other], 1.0)
        theirs.step()
        # Of so few elements torch's norm is good to a few ulp.
        torch.testing.assert_close(grad_norm, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(param.grad, other.grad, rtol=1e-6, atol=0)
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])  # the square of 3e38 is inf in float32
def test_non_finite_norm_does_as_torch_does(isa: str, bad: float, max_norm: float) -> None:
    values, grad = torch.randn(100), torch.randn(100)
    grad[7] = bad
    param, other = parameter(values), parameter(values)
    param.grad, other.grad = grad.clone(), grad.clone()
    grad_norm = FusedSGD([param], lr=0.1, momentum=0.9).clipped_step(max_norm)
    expected = torch.nn.utils.clip_grad_norm_([other], max_norm)
    torch_sgd([{"params": [other]}], lr=0.1, momentum=0.9).step()
    assert not math.isfinite(float(expected))
    np.testing.assert_array_equal(grad_norm, expected)
    np.testing.assert_array_equal(param.grad, other.grad)
    assert_same_bits([param], [other])


def test_a_norm_beyond_float32_is_inf() -> None:
    """Only gradients of float64 get that far: a chunk of float32 overflows before."""
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    param.grad = torch.full((3,), 1e39, dtype=torch.float64)
    assert float(FusedSGD([param]).clipped_step(1.0)) == math.inf


def test_squares_are_summed_beyond_float32() -> None:
    """A chunk's sum of squares has to fit into float32, their total need not: here it is 6e40."""
    params = [nn.Parameter(torch.zeros(64)) for _ in range(1000)]
    for p in params:
        p.grad = torch.full((64,), 1e18)
    assert float(FusedSGD(params).clipped_step(1.0)) == pytest.approx(1e18 * math.sqrt(64_000))


def test_zero_gradients_are_not_scaled(isa: str) -> None:
    param = nn.Parameter(torch.randn(100))
    before = param.detach().clone()
    param.grad = torch.zeros(100)
    assert float(FusedSGD([param], lr=1.0).clipped_step(1e-30)) == 0.0
    assert_same_bits([param], [before])


def trajectory(isa: str, threads: int, scale: float = 1.0) -> list[Tensor]:
    """Weights, momenta and norms of a few clipped steps over many chunks, unaligned."""
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    sizes = (LARGE, 17, 0, 70_000, 1, 16_385)
    params = [parameter(scale * torch.randn(n, generator=random), offset=1) for n in sizes]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)
    optimizer._isa = isa
    norms = []
    for _ in range(3):
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=random)
        norms.append(optimizer.clipped_step(300.0 * scale))
    return [*params, *(optimizer.state[p]["momentum_buffer"] for p in params), *norms]


def test_same_bits_for_any_isa_and_number_of_threads() -> None:
    first = trajectory("scalar", 1)
    for isa in _core.supported_isas():
        for threads in (1, 2, 3):
            assert_same_bits(trajectory(isa, threads), first)


def test_flushed_denormals_are_flushed_in_every_thread(flush_denormal: None) -> None:
    """torch sets the mode of the calling thread only; workers follow it for the step, and then have theirs back."""
    first = trajectory("scalar", 1, scale=1e-38)
    torch.set_flush_denormal(False)
    assert any(not torch.equal(a, b) for a, b in zip(trajectory("scalar", 1, scale=1e-38), first, strict=True))
    for isa in _core.supported_isas():
        for threads in (1, 2):
            torch.set_flush_denormal(True)
            assert_same_bits(trajectory(isa, threads, scale=1e-38), first)
    torch.set_flush_denormal(False)
    torch.set_num_threads(2)
    assert float(torch.full((LARGE,), 1e-40).mul_(1.0).min()) > 0  # torch's loop runs on the workers, too


def test_denormals_stay_without_flushing(isa: str) -> None:
    values, grad = torch.full((1000,), 1e-39), torch.full((1000,), 1e-40)
    param, other = parameter(values), parameter(values)
    for p in (param, other):
        p.grad = grad.clone()
    FusedSGD([param], lr=0.3, momentum=0.9).step()
    torch_sgd([{"params": [other]}], lr=0.3, momentum=0.9).step()
    assert float(param.detach().max()) > 0
    assert_same_bits([param], [other])


def test_new_momentum_buffers_are_written_before_they_are_read(isa: str) -> None:
    """tests/conftest.py fills new memory with NaN; here 4,097 values would show it."""
    assert bool(torch.empty(3).isnan().all())
    param = nn.Parameter(torch.randn(4_097))
    param.grad = torch.randn(4_097)
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.step()
    assert_same_bits([optimizer.state[param]["momentum_buffer"]], [param.grad])


def test_parameters_without_gradient_are_skipped_not_decayed() -> None:
    used, unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer = FusedSGD([used, unused], lr=0.1, momentum=0.9, weight_decay=0.1)
    used.grad = torch.ones(5)
    optimizer.clipped_step(1e9)
    assert torch.equal(unused.detach(), torch.ones(5))
    assert unused not in optimizer.state
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(5))  # type: ignore[arg-type]


@pytest.mark.parametrize("dims", [(0, 3, 1, 2), (3, 2, 1, 0)], ids=["channels_last", "transposed"])
def test_dense_layouts_other_than_contiguous(isa: str, dims: tuple[int, ...]) -> None:
    def weights() -> nn.Parameter:
        memory = torch.linspace(-1, 1, 8 * 5 * 3 * 4).view(8, 3, 4, 5)
        return nn.Parameter(memory.clone().permute(dims))

    param, other = weights(), weights()
    assert not param.is_contiguous()
    ours, theirs = FusedSGD([param], lr=0.1, momentum=0.9), torch_sgd([{"params": [other]}], lr=0.1, momentum=0.9)
    for seed in range(3):
        for p in (param, other):
            torch.manual_seed(seed)
            p.grad = torch.empty_like(p).normal_()
        ours.step()
        theirs.step()
    assert ours.rest == {}
    assert_same_bits([param, *buffers(ours)], [other, *buffers(theirs)])
    assert ours.state[param]["momentum_buffer"].stride() == param.stride()
