"""16-bit parameters are trained as their float32 masters would be alone, and are never overruled by them."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrunner.optim import FusedAdam, FusedAdamW, FusedSGD

DTYPES = [torch.bfloat16, torch.float16]
# Around one piece, one chunk; nothing; an odd tail.
SIZES = (0, 1, 17, 1_023, 1_025, 16_385)
KINDS: dict[str, Any] = {
    "sgd": lambda params, **k: FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2, **k),
    "plain sgd": lambda params, **k: FusedSGD(params, lr=0.1, **k),
    "adamw": lambda params, **k: FusedAdamW(params, lr=0.1, **k),
}


def assert_same(a: Tensor, b: Tensor) -> None:
    np.testing.assert_array_equal(a.detach().float().numpy(), b.detach().float().numpy())  # NaN equals NaN


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_widens_as_torchs(isa: str, dtype: torch.dtype) -> None:
    """All 65,536 of them, denormals included, as gradients: 0 - 1 * g."""
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    param = nn.Parameter(torch.zeros(2**16, dtype=dtype))
    param.grad = grad.clone()
    optimizer = FusedSGD([param], lr=1.0)
    optimizer.step()
    assert optimizer.rest == {}
    assert_same(optimizer.state[param]["master"], -grad.float())
    assert_same(param, -grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_as_torchs(isa: str, dtype: torch.dtype) -> None:
    """Random bits, every exponent, and values halfway between two neighbours."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint32)
    near = np.arange(-(2**15), 2**15).astype(np.int16)
    steps = torch.from_numpy(near).view(dtype).float()
    halfway = (steps[:-1] + steps[1:]) / 2
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.0, 65520.0, 3.4e38])
    values = torch.cat([torch.from_numpy(bits.view(np.float32)), halfway, halfway * (1 + 2.0**-23), ends])
    param = nn.Parameter(values.to(dtype))
    param.grad = torch.zeros_like(param)
    optimizer = FusedSGD([param], lr=0.0)
    optimizer.state[param]["master"] = values.clone()
    optimizer.step()
    assert_same(param, values.to(dtype))
    # A master that was not what torch rounds to the parameter would have been replaced.
    assert_same(optimizer.state[param]["master"], values)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_as_the_masters_alone(isa: str, dtype: torch.dtype, kind: str, clip: float | None) -> None:
    ours = [nn.Parameter(torch.randn(n).to(dtype)) for n in SIZES]
    alone = [nn.Parameter(p.detach().float()) for p in ours]
    fused, reference = (KINDS[kind](params, clip_grad_norm=clip, ema_decay=0.5) for params in (ours, alone))
    # Of 16-bit gradients the norm is summed in pieces of 1,024, so its last bit, and all that is clipped, may differ.
    rtol, atol = (0.0, 0.0) if clip is None else (1e-6, 1e-7)
    for _ in range(3):
        for p, q in zip(ours, alone, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.float()
        fused.step()
        reference.step()
        assert fused.rest == {}
        for p, q in zip(ours, alone, strict=True):
            torch.testing.assert_close(fused.state[p]["master"], q.detach(), rtol=rtol, atol=atol)
            assert torch.equal(p, fused.state[p]["master"].to(dtype))
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(p.grad.float(), q.grad, rtol=2**-8, atol=1e-7)  # clipped, then rounded
    for a, b in zip(fused.ema_state_dict().values(), reference.ema_state_dict().values(), strict=True):
        assert a.dtype == torch.float32  # averages are of the masters
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_same_bits_for_any_number_of_threads() -> None:
    def trajectory(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        random = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=random).to(d)) for d in DTYPES for n in (100_001, 17, 50_000)]
        optimizer = FusedAdamW(params, lr=0.1, clip_grad_norm=1.0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
            optimizer.step()
        return [*params, *(optimizer.state[p]["master"] for p in params)]

    for a, b in zip(trajectory(1), trajectory(2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_updates_are_not_lost(dtype: torch.dtype) -> None:
    """What masters are for: 1,000 steps of 1e-5, each far below the parameter's resolution."""
    param = nn.Parameter(torch.ones(20, dtype=dtype))
    optimizer = FusedSGD([param], lr=1e-5)
    for _ in range(1_000):
        param.grad = torch.ones_like(param)
        optimizer.step()
    torch.testing.assert_close(param.detach().float(), torch.full((20,), 0.99), rtol=2**-8, atol=0)
    torch.testing.assert_close(optimizer.state[param]["master"], torch.full((20,), 0.99), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dense", [True, False], ids=["core", "rest"])
def test_a_parameter_that_was_changed_is_right(dense: bool) -> None:
    """A checkpoint loaded into the model, a swap with its averages: the master must not bring the old weights back."""
    memory = torch.zeros(40, dtype=torch.bfloat16)
    param = nn.Parameter(memory[:20] if dense else memory[::2])
    optimizer = FusedSGD([param], lr=2.0**-12)
    param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.no_grad():
        param[5:] = 3.0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert (optimizer.rest == {}) == dense
    master = optimizer.state[param]["master"]
    assert torch.equal(master[:5], torch.full((5,), -2 * 2.0**-12))
    assert torch.equal(master[5:], torch.full((15,), 3.0 - 2.0**-12))


@pytest.mark.parametrize("kind", KINDS)
def test_masters_are_saved_and_go_on(kind: str) -> None:
    def steps(params: list[nn.Parameter], optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            random = torch.Generator().manual_seed(seed)
            for p in params:
                p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
            optimizer.step()

    straight = [nn.Parameter(torch.linspace(-1, 1, 50).to(d)) for d in DTYPES]
    params = copy.deepcopy(straight)
    reference, optimizer = KINDS[kind](straight), KINDS[kind](params)
    steps(straight, reference, range(6))
    steps(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save(([p.detach() for p in params], optimizer.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    params = [nn.Parameter(v) for v in values]
    optimizer = KINDS[kind](params)
    optimizer.load_state_dict(state)
    assert all(v.dtype == torch.float32 for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor))
    steps(params, optimizer, range(3, 6))
    for p, q in zip(params, straight, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["master"], reference.state[q]["master"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_goes_to_and_comes_from_torch(dtype: torch.dtype) -> None:
    """torch's state of a 16-bit parameter is of 16 bits; ours becomes that there, and theirs float32 here."""
    param, other = nn.Parameter(torch.ones(9, dtype=dtype)), nn.Parameter(torch.ones(9, dtype=dtype))
    ours, theirs = FusedAdam([param], lr=0.1), torch.optim.Adam([other], lr=0.1)
    for p, optimizer in ((param, ours), (other, theirs)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    for source, target in ((ours, theirs), (theirs, ours)):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        for p, optimizer in ((param, ours), (other, theirs)):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert ours.rest == {}
    assert ours.state[param]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(param.detach().float(), other.detach().float(), rtol=0, atol=4 * 2**-8)


def test_unused_parameters_get_no_master() -> None:
    params = [nn.Parameter(torch.ones(3).bfloat16()) for _ in range(2)]
    optimizer = FusedAdamW(params, ema_decay=0.5)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert list(optimizer.state) == params[:1]
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert len(optimizer.state) == 2
