"""The CPU stand-in for CUDA graphs: a capture runs nothing, a replay everything, and it fails where CUDA does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fastrunner.step.graph_backend import Cost, check_input
from fastrunner.step.graph_stand_in import CaptureError, StandIn
from fastrunner.step.scalar_ring import ScalarRing
from fastrunner.step.torch_private import Unfit


def recorded(body, *known, generators=()):
    return StandIn().record(body, known, generators)


def test_a_capture_leaves_memory_and_generator_as_they_were_and_a_replay_runs_on_what_is_there_then():
    x, total, random = torch.ones(3), torch.zeros(3), torch.get_rng_state()

    def body():
        total.add_(x * 2)
        return torch.rand(1)

    recording, out = recorded(body, x, total)
    assert total.tolist() == [0, 0, 0]
    assert torch.equal(torch.get_rng_state(), random)
    recording.replay()
    x.fill_(5)
    recording.replay()
    assert total.tolist() == [12, 12, 12]
    torch.set_rng_state(random)
    torch.rand(1)
    assert torch.equal(out, torch.rand(1))  # the second draw: a replay goes on where the generator is


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x):
        return self.head(self.body(x))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=5), st.booleans())
def test_replays_of_forward_and_backward_have_eagers_bits(seeds, train):
    torch.manual_seed(0)
    net, x = Net().train(train), torch.zeros(4, 2, 5, 5)
    twin = Net().train(train)
    twin.load_state_dict(net.state_dict())
    params = list(net.parameters())

    def body():
        own = net(x).square().mean()
        return own.detach(), torch.autograd.grad(own, params)

    recording, (loss, grads) = recorded(body, x, *params, *net.buffers())
    for seed in seeds:
        batch = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
        x.copy_(batch)
        torch.manual_seed(seed)
        recording.replay()
        drawn = torch.get_rng_state()
        torch.manual_seed(seed)
        wanted = twin(batch).square().mean()
        assert torch.equal(torch.get_rng_state(), drawn)
        assert torch.equal(loss, wanted)
        for ours, theirs in zip(grads, torch.autograd.grad(wanted, list(twin.parameters())), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
            assert torch.equal(ours, theirs)


OTHER = torch.Generator().manual_seed(1)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda x: x.sum().item(), "reads the host"),
        (lambda x: x.tolist(), "reads the host"),
        (lambda x: x * 2 if x.sum() > 0 else x, "__bool__"),
        (lambda x: x[x > 0.5], "read on the host"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), "memory of the host"),
        (lambda x: x.pin_memory(), "memory of the host"),
        (lambda x: x + CONSTANT, "not on the device"),
        (lambda x: x.bernoulli(generator=OTHER), "generator"),
        (lambda x: F.dropout(x, 0.5) + torch.get_rng_state().sum(), "generator's state"),
    ],
)
def test_what_cuda_does_not_capture_is_refused(body, says):
    x = torch.ones(3)
    with pytest.raises(Unfit, match=says) as raised:
        recorded(lambda: body(x), x)
    assert isinstance(raised.value.__cause__, CaptureError)
    assert x.tolist() == [1, 1, 1]


CONSTANT = torch.ones(3)


def test_a_registered_generator_goes_on_from_replay_to_replay():
    x, generator = torch.full((4,), 0.5), torch.Generator().manual_seed(7)
    recording, out = recorded(lambda: x.bernoulli(generator=generator), x, generators=[generator])
    twin = torch.Generator().manual_seed(7)
    for _ in range(3):
        recording.replay()
        assert torch.equal(out, x.bernoulli(generator=twin))


def test_a_replay_says_that_memory_has_moved_or_was_freed():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    recording, _ = recorded(lambda: layer(x), x, *layer.parameters())
    layer.weight.data = layer.weight.data.clone()
    with pytest.raises(CaptureError, match="moved"):
        recording.replay()
    recording.free()
    with pytest.raises(CaptureError, match="freed"):
        recording.replay()


def test_a_pool_that_cannot_grow_is_an_out_of_memory_error():
    x = torch.ones(1000)
    with pytest.raises(torch.OutOfMemoryError):
        StandIn(free=100).record(lambda: x * 2, [x], [])


@pytest.mark.parametrize("given", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)])
def test_an_input_of_another_shape_or_dtype_is_refused_where_copy_would_stretch_or_convert_it(given):
    with pytest.raises(ValueError, match="a static input is"):
        check_input(torch.zeros(2), given)


def test_the_share_in_which_the_device_waits():
    assert Cost(4.0, 1.0).launch_bound == 0.75
    assert Cost(1.0, 4.0).launch_bound == 0.0
    assert Cost(0.0, 0.0).launch_bound == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.lists(st.booleans(), min_size=1, max_size=20))
def test_values_of_the_ring_stay_for_whoever_holds_them(rows, keeps):
    backend, x = StandIn(), torch.zeros(2)
    ring = ScalarRing(backend, [torch.float32, torch.int64, torch.float32], rows)
    recording, _ = backend.record(lambda: ring.write([x[0] * 2, x[1].long(), x.sum()]), [x, *ring.tensors], [])
    held = []
    for number, keep in enumerate(keeps):
        x.copy_(torch.tensor([number, 10.0 + number]))
        row = ring.take()
        recording.replay()
        assert [value.item() for value in row] == [2 * number, 10 + number, 10 + 2 * number]
        assert [value.dtype for value in row] == list(ring.dtypes)
        if keep:
            held.append((number, row[1]))
        del row
    assert [int(value) for _, value in held] == [10 + number for number, _ in held]
