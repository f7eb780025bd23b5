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
from fastrunner.kernels.update import Kind, Rows
from kernel_tables import BLOCK, SIZES, addresses, assert_near, chunks, many, randn, values
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


class Problem:
    """Parameters of some groups, and one launch over them."""

    def __init__(
        self, device: torch.device, kind: Kind, options: list[dict[str, Any]], *, sizes: tuple[int, ...]
    ) -> None:
        self.device, self.kind, self.amsgrad = device, kind, options[0].get("amsgrad", False)
        self.options = [{"betas": (0.9, 0.999), "eps": 1e-8, **o} for o in options]
        self.groups = [i % len(options) for i in range(len(sizes))]
        self.params = many(device, kind.param, sizes=sizes)
        self.grads: list[Tensor | None] = list(many(device, kind.grad, sizes=sizes))
        self.exp_avgs = many(device, kind.state, sizes=sizes)
        self.exp_avg_sqs = [t.square_().add_(0.1) for t in many(device, kind.state, sizes=sizes)]
        self.largest = [t.square_().add_(0.1) for t in many(device, kind.state, sizes=sizes)]
        self.averages = many(device, kind.average, sizes=sizes) if kind.average else []
        self.lows = [p.to(kind.low) for p in self.params] if kind.low else []
        if kind.low:  # masters agree with their parameters
            for p, low in zip(self.params, self.lows, strict=True):
                p.copy_(low)
        self.steps = [1 + i % 3 for i in range(len(sizes))]

    def states(self) -> list[list[Tensor]]:
        return [self.exp_avgs, self.exp_avg_sqs, *([self.largest] if self.amsgrad else [])]

    def bias(self) -> Tensor:
        rows = []
        for group, step in zip(self.groups, self.steps, strict=True):
            o = self.options[group]
            rows.append([o["lr"] / (1 - o["betas"][0] ** step), math.sqrt(1 - o["betas"][1] ** step)])
        return torch.tensor(rows, dtype=torch.float32).to(self.device)

    def launch(
        self, *, decoupled: bool, clip_coef: float = 1.0, found_inf: float = 0.0, ema_momentum: float = 0.0
    ) -> None:
        rows = Rows(
            addresses(self.params, self.device),
            addresses(self.grads, self.device),
            torch.tensor(self.groups, device=self.device),
            tuple(addresses(states, self.device) for states in self.states()),
            addresses(self.averages, self.device) if self.averages else None,
            addresses(self.lows, self.device) if self.lows else None,
        )
        options = [(o["lr"], o["weight_decay"], *o["betas"], o["eps"]) for o in self.options]
        launch_adam(
            chunks(self.params, self.groups, self.device),
            rows,
            self.bias(),
            torch.tensor([7.0, clip_coef, found_inf], device=self.device),
            values(options, self.device, ema_momentum=ema_momentum),
            self.kind,
            decoupled=decoupled,
            block=BLOCK,
        )

    def check(
        self, *, decoupled: bool, clip_coef: float = 1.0, found_inf: float = 0.0, ema_momentum: float = 0.0
    ) -> None:
        """Launch, and compare with float64."""
        kinds = (self.params, self.exp_avgs, self.exp_avg_sqs, self.largest, self.averages)
        before = [[t.double() for t in tensors] for tensors in kinds]
        grads = [None if g is None else g.double() for g in self.grads]
        self.launch(decoupled=decoupled, clip_coef=clip_coef, found_inf=found_inf, ema_momentum=ema_momentum)
        kind = self.kind
        coef = clip_coef if kind.clip else 1.0
        for i, g in enumerate(grads):
            p, m, v, largest = (before[j][i] for j in range(4))
            if g is not None and not (kind.skip_nonfinite and found_inf):
                options = dict(
                    self.options[self.groups[i]], maximize=kind.maximize, clip_coef=coef, decoupled=decoupled
                )
                options["max_exp_avg_sq"] = largest if options.pop("amsgrad", False) else None
                p, m, v, *most = adam_reference(p, g, m, v, self.steps[i], **options)
                if self.amsgrad:
                    assert_near(self.largest[i], most[0], roundings=6)
                if kind.write_back:
                    assert_near(self.grads[i], g * coef, roundings=1)
            assert_near(self.params[i], p, roundings=ROUNDINGS)
            assert_near(self.exp_avgs[i], m, roundings=4)
            assert_near(self.exp_avg_sqs[i], v, roundings=6)
            if self.lows:
                assert_near(self.lows[i], self.params[i].double(), roundings=1)
            if self.averages:
                expected = before[4][i] * (1 - ema_momentum) + ema_momentum * p
                assert_near(self.averages[i], expected, roundings=ROUNDINGS)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("decoupled", "maximize"), [(False, False), (True, True)])
def test_options(device: torch.device, options: dict[str, Any], decoupled: bool, maximize: bool) -> None:
    kind = Kind(torch.float32, torch.float32, torch.float32, maximize=maximize)
    problem = Problem(device, kind, [options, {**options, "lr": 0.01, "weight_decay": 0.0}], sizes=SIZES)
    problem.grads[4] = problem.grads[-1] = None
    problem.check(decoupled=decoupled)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.param}-{kind.low}".replace("torch.", ""))
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_all_folded_in(device: torch.device, kind: Kind, found_inf: float) -> None:
    problem = Problem(device, kind, [OPTIONS[1]], sizes=SIZES)
    problem.grads[4] = problem.grads[-1] = None  # averaged all the same
    problem.check(decoupled=True, clip_coef=0.3, found_inf=found_inf, ema_momentum=0.125)


def test_a_skipped_step_reads_no_gradient(device: torch.device) -> None:
    problem = Problem(device, KINDS[0], [OPTIONS[1]], sizes=(700,))
    kept = (problem.params[0], problem.exp_avgs[0], problem.exp_avg_sqs[0])
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
    problem.check(decoupled=decoupled, clip_coef=coef, ema_momentum=0.25)
