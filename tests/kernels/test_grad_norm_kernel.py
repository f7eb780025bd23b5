"""The joint norm and clip factor, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from fastrunner.kernels.grad_norm import grad_norm, grad_norm_reference
from kernel_tables import BLOCK, CHUNK, many, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_over_awkward_sizes(device: torch.device, dtype: torch.dtype) -> None:
    grads = many(device, dtype)
    found = grad_norm(grads, 1.0, chunk=CHUNK, block=BLOCK)
    # Products of a lane are added in float32, at most 4 in a chunk here: 2**-23 relative; lanes in float64.
    torch.testing.assert_close(found, grad_norm_reference(grads, 1.0), rtol=2**-22, atol=0)
    assert found.shape == (3,)


def test_mixed_dtypes_and_layouts(device: torch.device) -> None:
    grads = [
        torch.randn(4, 3, 5, 5, device=device).to(memory_format=torch.channels_last),
        randn(1_025, device, torch.bfloat16),
        randn(77, device, offset=1).view(7, 11).t(),
        torch.full((3,), 2.0, device=device, dtype=torch.float16),
        torch.tensor(3.0, device=device),
    ]
    found = grad_norm(grads, 1e9, chunk=CHUNK, block=BLOCK)
    torch.testing.assert_close(found, grad_norm_reference(grads, 1e9), rtol=2**-22, atol=0)
    assert found[1].item() == 1.0  # nothing to clip


def test_same_gradients_same_bits(device: torch.device) -> None:
    grads = many(device)
    first = grad_norm(grads, 1.0, chunk=CHUNK, block=BLOCK)
    for _ in range(2):
        assert torch.equal(grad_norm(grads, 1.0, chunk=CHUNK, block=BLOCK), first)


def test_nothing_at_all() -> None:
    assert grad_norm([], 1.0).tolist() == [0.0, 1.0, 0.0]


def test_zero_gradients(device: torch.device) -> None:
    norm, coef, found_inf = grad_norm([torch.zeros(300, device=device)], 1.0, chunk=CHUNK, block=BLOCK).tolist()
    assert (norm, coef, found_inf) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 700, 2_999])  # vectorised, in the second block; in the tail
def test_not_finite_anywhere(device: torch.device, bad: float, place: int) -> None:
    grads = [torch.ones(3_000, device=device)]
    grads[0][place] = bad
    norm, coef, found_inf = grad_norm(grads, 1.0, chunk=CHUNK, block=BLOCK).tolist()
    assert found_inf == 1.0
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert math.isnan(coef) if math.isnan(bad) else coef == 0.0


def test_more_precise_than_torch(device: torch.device) -> None:
    """Equal values are torch's worst case: each partial sum is rounded in the same direction."""
    grads = [torch.full((200_000,), 0.1, device=device)]
    exact = 0.1 * math.sqrt(200_000)
    found = grad_norm(grads, chunk=16_384, block=1_024)[0].item()
    assert found == pytest.approx(exact, rel=2**-22)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="must be dense"):
        grad_norm([torch.zeros(4)[::2]])
    with pytest.raises(ValueError, match=r"torch\.float64"):
        grad_norm([torch.zeros(4, dtype=torch.float64)])
