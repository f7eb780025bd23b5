"""The Adam kernel against float64, over options, dtypes, sizes and alignments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from fastrunner.kernels.adam import adam_reference, launch_adam
from fastrunner.kernels.update import Kind
from kernel_tables import BLOCK, SIZES, Exact, Tensors, assert_near, many, randn, values
from torch import Tensor

# A step rounds some twenty times. Where exp_avg_sq is tiny against exp_avg**2, p moves far and the error with it: the
# states here are of one order.
ROUNDINGS = 24
FOLDED = dict(clip=True, write_back=True, skip_nonfinite=True)
HALVES = (torch.bfloat16, torch.float16)
KINDS = [
    Kind(torch.float32, torch.float32, torch.float32, torch.float32, **FOLDED),
    *(Kind(torch.float32, half, torch.float32, torch.float32, half, **FOLDED) for half in HALVES),  # masters
    Kind(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, **FOLDED),
]
OPTIONS = [
    dict(lr=0.1, weight_decay=0.0),
    dict(lr=0.1, weight_decay=0.01),
    dict(lr=0.01, weight_decay=0.1, betas=(0.5, 0.9), eps=1e-3),
    dict(lr=0.1, weight_decay=0.01, betas=(0.0, 0.99)),
    dict(lr=0.1, weight_decay=0.01, amsgrad=True),
]


class Problem(Tensors):
    """And one launch over them."""

    def __init__(
        self, device: torch.device, kind: Kind, options: list[dict[str, Any]], *, sizes: tuple[int, ...]
    ) -> None:
        super().__init__(device, kind, len(options), sizes)
        self.options = [{"betas": (0.9, 0.999), "eps": 1e-8, **o} for o in options]
        num_squares = 2 if options[0].get("amsgrad") else 1
        squares = [[t.square_().add_(0.1) for t in many(device, kind.state, sizes=sizes)] for _ in range(num_squares)]
        self.states = [many(device, kind.state, sizes=sizes), *squares]
        self.steps = [1 + i % 3 for i in range(len(sizes))]

    def bias(self) -> Tensor:
        rows = []
        for group, step in zip(self.groups, self.steps, strict=True):
            o = self.options[group]
            rows.append([o["lr"] / (1 - o["betas"][0] ** step), math.sqrt(1 - o["betas"][1] ** step)])
        return torch.tensor(rows, dtype=torch.float32).to(self.device)

    def launch(
        self, *, decoupled: bool, clip_coef: float = 1.0, found_inf: float = 0.0, ema_momentum: float = 0.0
    ) -> None:
        options = [(o["lr"], o["weight_decay"], *o["betas"], o["eps"]) for o in self.options]
        launch_adam(
            self.chunks(),
            self.rows(*self.states),
            self.bias(),
            torch.tensor([7.0, clip_coef, found_inf], device=self.device),
            values(options, self.device, ema_momentum=ema_momentum),
            self.kind,
            decoupled=decoupled,
            block=BLOCK,
        )

    def launch_and_check(
        self, *, decoupled: bool, clip_coef: float = 1.0, found_inf: float = 0.0, ema_momentum: float = 0.0
    ) -> None:
        """Compare with float64."""
        before = [[t.double() for t in tensors] for tensors in (self.params, self.averages, *self.states)]
        grads = [None if g is None else g.double() for g in self.grads]
        self.launch(decoupled=decoupled, clip_coef=clip_coef, found_inf=found_inf, ema_momentum=ema_momentum)
        coef = clip_coef if self.kind.clip else 1.0
        for i, g in enumerate(grads):
            p, average, m, v, *largest = (tensors[i] if tensors else None for tensors in before)
            clipped = None
            if g is not None and self.acts(i, found_inf):
                options = dict(self.options[self.groups[i]], maximize=self.kind.maximize, clip_coef=coef)
                options["max_exp_avg_sq"] = largest[0] if options.pop("amsgrad", False) else None
                p, m, v, *largest = adam_reference(p, g, m, v, self.steps[i], **options, decoupled=decoupled)
                clipped = g * coef if self.kind.write_back else None
            self.check(i, Exact(p, average, clipped), roundings=ROUNDINGS, ema_momentum=ema_momentum)
            for state, exact in zip(self.states, (m, v, *largest), strict=True):
                assert_near(state[i], exact, roundings=6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("decoupled", "maximize"), [(False, False), (True, True)])
def test_options(device: torch.device, options: dict[str, Any], decoupled: bool, maximize: bool) -> None:
    kind = Kind(torch.float32, torch.float32, torch.float32, maximize=maximize)
    problem = Problem(device, kind, [options, {**options, "lr": 0.01, "weight_decay": 0.0}], sizes=SIZES)
    problem.grads[4] = problem.grads[-1] = None
    problem.launch_and_check(decoupled=decoupled)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.param}-{kind.low}".replace("torch.", ""))
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_all_folded_in(device: torch.device, kind: Kind, found_inf: float) -> None:
    problem = Problem(device, kind, [OPTIONS[1]], sizes=SIZES)
    problem.grads[4] = problem.grads[-1] = None  # averaged all the same
    problem.launch_and_check(decoupled=True, clip_coef=0.3, found_inf=found_inf, ema_momentum=0.125)


def test_a_skipped_step_reads_no_gradient(device: torch.device) -> None:
    problem = Problem(device, KINDS[0], [OPTIONS[1]], sizes=(700,))
    kept = (problem.params[0], *(state[0] for state in problem.states))
    before = [t.clone() for t in kept]
    problem.grads[0] = torch.full((700,), math.nan, device=device)
    problem.launch(decoupled=True, clip_coef=math.nan, found_inf=1.0)
    for now, then in zip(kept, before, strict=True):
        assert torch.equal(now, then)


@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 2_500), min_size=1, max_size=4).map(tuple),
    offsets=st.integers(0, 7),
    kind=st.sampled_from(KINDS),
    switches=st.tuples(*[st.booleans()] * 5),
    options=st.sampled_from(OPTIONS),
    coef=st.sampled_from([1.0, 0.25, 0.0]),
)
def test_any_combination(
    device: torch.device,
    sizes: tuple[int, ...],
    offsets: int,
    kind: Kind,
    switches: tuple[bool, ...],
    options: dict[str, Any],
    coef: float,
) -> None:
    clip, write_back, maximize, average, decoupled = switches
    kind = dataclasses.replace(kind, clip=clip, write_back=clip and write_back, maximize=maximize)
    kind = kind if average else dataclasses.replace(kind, average=None)
    problem = Problem(device, kind, [options, {**options, "lr": 0.5}], sizes=sizes)
    problem.grads = [randn(n, device, kind.grad, offset=offsets) for n in sizes]
    problem.launch_and_check(decoupled=decoupled, clip_coef=coef, ema_momentum=0.25)
