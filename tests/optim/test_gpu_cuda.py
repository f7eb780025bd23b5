"""The optimizers on a real GPU: no host waits, CUDA graphs, large tensors, torch's fused optimizers.

What they compute is in test_gpu_table.py and tests/kernels, which run on a GPU as well where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastrunner.kernels.ema import ema_
from fastrunner.kernels.grad_norm import grad_norm
from fastrunner.kernels.normalize_u8 import normalize_u8, normalize_u8_reference
from torch import Tensor, nn

from fastrunner.optim import EmaTerm, FusedAdam, FusedAdamW, FusedSGD
from fastrunner.optim.gpu_page import NUM_SPARES

pytestmark = pytest.mark.cuda

GIB = 2**30
OPTIMIZERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (FusedSGD, dict(lr=0.1)),
    (FusedSGD, dict(lr=0.1, momentum=0.9, weight_decay=1e-4)),
    (FusedSGD, dict(lr=0.1, momentum=0.9, dampening=0.5)),
    (FusedAdam, dict(lr=1e-3, weight_decay=1e-2)),
    (FusedAdamW, dict(lr=1e-3)),
    (FusedAdamW, dict(lr=1e-3, amsgrad=True)),
]
each = pytest.mark.parametrize(("make", "options"), OPTIMIZERS)


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.set_default_device(None)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 33)]
    return nn.Sequential(*layers).to("cuda", dtype)


def batch(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(number)
    return torch.randn(4, 3, 8, 8, generator=generator, device="cpu").to("cuda", dtype)


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().square().mean()


def averages_of(model: nn.Module) -> EmaTerm:
    params = list(model.parameters())
    return EmaTerm(params, [p.detach().float() for p in params], 1e-2, of_masters=True)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_never_waits(make: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Clipped, skipping, averaging, with another lr each time; and when a parameter gets its first gradient."""
    model = network(dtype)
    late = nn.Parameter(torch.ones(77, dtype=dtype))
    optimizer = make([*model.parameters(), late], **options, skip_nonfinite=True)
    term = averages_of(model)
    norms = []
    for number in range(6):
        loss_of(model, batch(number, dtype)).backward()
        if number >= 3:
            late.grad = torch.ones_like(late)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + number)
        optimizer.step(max_norm=0.1, ema=term, zero=True)
        torch.cuda.set_sync_debug_mode("default")
        norms.append(optimizer.grad_norm)
    assert all(norm.is_cuda and norm.isfinite().item() for norm in norms)
    assert len({norm.item() for norm in norms}) == 6  # each step's own


@each
def test_as_torch_fused(make: Callable[..., Any], options: dict[str, Any]) -> None:
    """Twenty clipped steps beside torch's fused kernels."""
    ours, theirs = network(), network()
    fused = make(ours.parameters(), **options)
    kinds = {FusedSGD: torch.optim.SGD, FusedAdam: torch.optim.Adam, FusedAdamW: torch.optim.AdamW}
    other = kinds[make](theirs.parameters(), **options, fused=True)
    for number in range(20):
        grads = [torch.randn_like(p) for p in ours.parameters()]
        for p, q, g in zip(ours.parameters(), theirs.parameters(), grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        other.step()
        norm = fused.clipped_step(1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)  # torch's own error
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            # Both round in float32, in another order: a few 2**-24 a step at values of order 1.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6, msg=f"step {number}")


class Captured:
    """Forward, backward and step of a model in a CUDA graph, beside the same model without one."""

    def __init__(self, make: Callable[..., Any], options: dict[str, Any]) -> None:
        self.lr = torch.tensor(options["lr"], dtype=torch.float64)
        self.model, self.plain = network(), network()
        self.optimizer = make(self.model.parameters(), **{**options, "lr": self.lr}, skip_nonfinite=True)
        self.other = make(self.plain.parameters(), **options, skip_nonfinite=True)
        self.images = batch(0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for number in range(3):
                self.images.copy_(batch(number))
                self.step(self.model, self.optimizer, self.images)
                self.step(self.plain, self.other, batch(number))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.images.copy_(batch(3))
        with torch.cuda.graph(self.graph, stream=stream):
            self.step(self.model, self.optimizer, self.images)

    @staticmethod
    def step(model: nn.Module, optimizer: Any, images: Tensor) -> None:
        for p in model.parameters():
            p.grad = None
        loss_of(model, images).backward()
        optimizer.step(max_norm=0.1)

    def replay(self, images: Tensor) -> None:
        self.images.copy_(images)
        self.graph.replay()
        self.step(self.plain, self.other, images)

    def assert_same(self) -> None:
        for p, q in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(self.optimizer.grad_norm, self.other.grad_norm, rtol=1e-5, atol=0, equal_nan=True)


@each
def test_replays_as_eager(make: Callable[..., Any], options: dict[str, Any]) -> None:
    both = Captured(make, options)
    for number in range(3, 8):
        both.lr.fill_(options["lr"] / number)  # read by the graph, on the device
        both.other.param_groups[0]["lr"] = options["lr"] / number
        both.replay(batch(number))
        both.assert_same()


@each
def test_a_replay_skips_what_is_not_finite(make: Callable[..., Any], options: dict[str, Any]) -> None:
    both = Captured(make, options)
    bad = batch(3)
    bad[0, 0, 0, 0] = math.inf
    before = [p.detach().clone() for p in both.model.parameters()]
    both.replay(bad)
    assert not both.optimizer.grad_norm.isfinite().item()
    for p, then in zip(both.model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), then)


def test_eager_steps_between_replays() -> None:
    """A graph keeps the addresses of its own gradients, whatever an eager step has sent since."""
    both = Captured(FusedAdamW, dict(lr=1e-3))
    for number in range(3, 9):
        if number % 2:
            both.replay(batch(number))
        else:
            both.step(both.model, both.optimizer, batch(number))
            both.step(both.plain, both.other, batch(number))
        both.assert_same()


def test_a_graph_outlives_a_new_table() -> None:
    """Its tables stay, though the optimizer builds others for a parameter that was added."""
    both = Captured(FusedSGD, dict(lr=0.1, momentum=0.9))
    for optimizer in (both.optimizer, both.other):
        more = nn.Parameter(torch.ones(5))
        optimizer.add_param_group(dict(params=[more]))
        more.grad = torch.ones(5)
    both.step(both.model, both.optimizer, batch(3))
    both.step(both.plain, both.other, batch(3))
    torch.cuda.empty_cache()
    both.replay(batch(4))
    both.assert_same()


def test_capturing_wants_a_warm_up() -> None:
    weight = nn.Parameter(torch.ones(5))
    weight.grad = torch.ones(5)
    optimizer = FusedSGD([weight], lr=1.0)
    with (
        pytest.raises(RuntimeError, match="do a step outside of the capture first"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_several_steps_in_one_graph() -> None:
    weight = nn.Parameter(torch.zeros(5))
    weight.grad = torch.ones(5)
    optimizer = FusedSGD([weight], lr=1.0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NUM_SPARES):
            optimizer.step()
    graph.replay()
    assert weight.detach().tolist() == [-1.0 - NUM_SPARES] * 5


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 24 * GIB, reason="takes 18 GiB"
)
def test_more_elements_than_32_bits_count() -> None:
    size = 2**31 + 4_097
    weight = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = FusedSGD([weight], lr=0.5)
    norm = optimizer.clipped_step(1e9)
    assert norm.item() == pytest.approx(math.sqrt(size), rel=1e-6)
    assert weight.detach()[-1].item() == weight.detach()[0].item() == -0.5
    assert weight.detach().amin().item() == weight.detach().amax().item() == -0.5


def test_the_same_norm_bit_for_bit() -> None:
    grads = [torch.randn(n) for n in (1_000_003, 17, 4_096, 300_000)]
    norms = {grad_norm(grads)[0].item() for _ in range(20)}
    assert len(norms) == 1
    exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert norms.pop() == pytest.approx(exact, rel=2**-22)


def test_kernels_alone_wait_for_nobody_and_can_be_captured() -> None:
    values, averages, momentum = [torch.ones(1_000)], [torch.zeros(1_000)], torch.tensor(0.5)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, inv_std = torch.full((3,), 120.0), torch.full((3,), 1 / 60)
    ema_(averages, values, momentum)
    normalize_u8(images, mean, inv_std)
    torch.cuda.set_sync_debug_mode("error")
    ema_(averages, values, momentum)
    floats = normalize_u8(images, mean, inv_std)
    torch.cuda.set_sync_debug_mode("default")
    assert averages[0][0].item() == 0.75
    torch.testing.assert_close(floats, normalize_u8_reference(images, mean, inv_std), rtol=2**-7, atol=0)


def test_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    weight = nn.Parameter(torch.ones(300, device="cuda:1"))
    weight.grad = torch.ones_like(weight)
    optimizer = FusedAdamW([weight], lr=0.5, weight_decay=0.0)
    norm = optimizer.clipped_step(1e9)
    assert norm.device == weight.device
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.5))
