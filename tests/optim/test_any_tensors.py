"""One step over whatever parameters there may be: any size, alignment, dtype and group, together."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrunner import _core
from fastrunner.optim import FusedAdamW, FusedSGD

# Nothing; around one lane and one register; a part of a chunk; many chunks and a tail, where shares of threads end.
SIZES = (0, 1, 15, 16, 17, 63, 4_097, 1_000_003)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
PAIRS: dict[str, Any] = {
    "sgd": (FusedSGD, torch.optim.SGD, [dict(momentum=0.9, nesterov=True), {}, dict(maximize=True)]),
    "adamw": (FusedAdamW, torch.optim.AdamW, [{}, dict(amsgrad=True), dict(betas=(0.5, 0.9))]),
}


@st.composite
def tensors(draw: st.DrawFn) -> tuple[int, int, torch.dtype]:
    """(size, offset from alignment in elements, dtype)."""
    return draw(st.sampled_from(SIZES)), draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES))


# At most two groups of three: a million floats take torch's reference, with numpy's roots, 20 ms a step.
groups_of_tensors = st.lists(st.lists(tensors(), min_size=1, max_size=3), min_size=1, max_size=2)


def parameter(values: Tensor, offset: int, dtype: torch.dtype) -> nn.Parameter:
    memory = torch.empty(values.numel() + offset, dtype=dtype)
    return nn.Parameter(memory[offset:].copy_(values))


@pytest.mark.parametrize("kind", PAIRS)
@hypothesis.settings(
    max_examples=20,
    deadline=None,  # two cores in common use are too slow for one
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(data=st.data())
def test_as_torch_on_float32_and_norms_of_float64(nearest_roots: None, kind: str, data: st.DataObject) -> None:
    """A 16-bit parameter is its float32 master, rounded; the masters have the bits of torch's own float32 steps."""
    fused_class, torch_class, choices = PAIRS[kind]
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    shapes = data.draw(groups_of_tensors)
    options = [data.draw(st.sampled_from(choices)) for _ in shapes]
    ours = [[parameter(torch.randn(n, generator=random), *how) for n, *how in group] for group in shapes]
    theirs = [[nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in group] for group in ours]
    # It makes the step take the norm, and does not clip.
    fused = fused_class([{"params": p, **o} for p, o in zip(ours, options, strict=True)], lr=0.1, skip_nonfinite=True)
    fused._isa = data.draw(st.sampled_from(_core.supported_isas()))
    reference = torch_class([{"params": p, **o} for p, o in zip(theirs, options, strict=True)], lr=0.1, foreach=False)
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    for _ in range(2):
        for p, q in pairs:
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype) if data.draw(st.integers(0, 4)) else None
            q.grad = None if p.grad is None else p.grad.to(torch.float32, copy=True)
        squares = sum(float(q.grad.double().square().sum()) for _, q in pairs if q.grad is not None)
        fused.step()
        reference.step()
        assert fused.rest == {}
        assert fused.grad_norm is not None
        # A float32 of a sum in double precision: half of its last bit, and what lanes of float32 lose (1e-9).
        np.testing.assert_allclose(float(fused.grad_norm), squares**0.5, rtol=1e-7)
        for p, q in pairs:
            np.testing.assert_array_equal(p.detach().float().numpy(), q.detach().to(p.dtype).float().numpy())
            if p.dtype != torch.float32 and p.grad is not None:
                np.testing.assert_array_equal(fused.state[p]["master"].numpy(), q.detach().numpy())
