"""The SGD kernel against float64, over options, dtypes, sizes and alignments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from fastrunner.kernels.sgd import launch_sgd, sgd_reference
from fastrunner.kernels.update import Kind
from kernel_tables import BLOCK, SIZES, Exact, Tensors, assert_near, many, randn, values

FLOAT = Kind(torch.float32, torch.float32, torch.float32)
ROUNDINGS = 8  # a step rounds at most eight times, here values of order 1


class Problem(Tensors):
    """And one launch over them."""

    def __init__(
        self, device: torch.device, kind: Kind, options: list[dict[str, Any]], *, sizes: tuple[int, ...]
    ) -> None:
        super().__init__(device, kind, len(options), sizes)
        self.options = options
        self.buffers = many(device, kind.state, sizes=sizes) if kind.state else []
        self.counts = [torch.tensor(2.0, device=device) for _ in sizes]

    def launch(self, *, clip_coef: float = 1.0, found_inf: float = 0.0, ema_momentum: float = 0.0) -> None:
        options = [(o["lr"], o["weight_decay"], o.get("momentum", 0.0), o.get("dampening", 0.0)) for o in self.options]
        launch_sgd(
            self.chunks(),
            self.rows(*([self.buffers] if self.buffers else []), counts=self.counts),
            torch.tensor([7.0, clip_coef, found_inf], device=self.device),
            values(options, self.device, ema_momentum=ema_momentum),
            self.kind,
            nesterov=self.options[0].get("nesterov", False),
            block=BLOCK,
        )

    def launch_and_check(self, *, clip_coef: float = 1.0, found_inf: float = 0.0, ema_momentum: float = 0.0) -> None:
        """Compare with float64."""
        before = [[t.double() for t in ts] for ts in (self.params, self.buffers, self.averages)]
        grads = [None if g is None else g.double() for g in self.grads]
        self.launch(clip_coef=clip_coef, found_inf=found_inf, ema_momentum=ema_momentum)
        coef = clip_coef if self.kind.clip else 1.0
        for i, g in enumerate(grads):
            p, m, average = (ts[i] if ts else None for ts in before)
            clipped = None
            if g is not None and self.acts(i, found_inf):
                m = None if self.counts[i].item() == 1.0 else m
                options = self.options[self.groups[i]]
                p, m = sgd_reference(p, g, m, **options, maximize=self.kind.maximize, clip_coef=coef)
                clipped = g * coef if self.kind.write_back else None
            self.check(i, Exact(p, average, clipped), roundings=ROUNDINGS, ema_momentum=ema_momentum)
            if m is not None:
                assert_near(self.buffers[i], m, roundings=ROUNDINGS)


OPTIONS = [
    dict(lr=0.1, weight_decay=0.0),
    dict(lr=0.1, weight_decay=0.01, momentum=0.9),
    dict(lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True),
    dict(lr=0.1, weight_decay=0.0, momentum=0.5, dampening=0.25),
]


def of(kind: Kind, options: dict[str, Any]) -> Kind:
    return kind if options.get("momentum") else dataclasses.replace(kind, state=None)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("maximize", [False, True])
def test_options(device: torch.device, options: dict[str, Any], maximize: bool) -> None:
    kind = dataclasses.replace(of(FLOAT, options), maximize=maximize)
    problem = Problem(device, kind, [options, {**options, "lr": 0.01, "weight_decay": 0.0}], sizes=SIZES)
    problem.grads[4] = problem.grads[-1] = None
    problem.counts[3].fill_(1.0)  # the first step of one tensor, not of the others
    problem.launch_and_check()


# Everything folded in, for each combination of dtypes that an optimizer makes.
FOLDED = dict(clip=True, write_back=True, skip_nonfinite=True)
HALVES = (torch.bfloat16, torch.float16)
KINDS = [
    Kind(torch.float32, torch.float32, torch.float32, torch.float32, **FOLDED),
    *(Kind(torch.float32, half, torch.float32, torch.float32, half, **FOLDED) for half in HALVES),  # masters
    *(Kind(half, half, half, half, **FOLDED) for half in HALVES),  # none
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.param}-{kind.low}".replace("torch.", ""))
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_all_folded_in(device: torch.device, kind: Kind, found_inf: float) -> None:
    problem = Problem(device, kind, [OPTIONS[2]], sizes=SIZES)
    problem.grads[4] = problem.grads[-1] = None  # averaged all the same
    problem.launch_and_check(clip_coef=0.3, found_inf=found_inf, ema_momentum=0.125)


def test_a_skipped_step_reads_no_gradient(device: torch.device) -> None:
    problem = Problem(device, KINDS[0], [OPTIONS[1]], sizes=(700,))
    before = [t.clone() for t in (problem.params[0], problem.buffers[0])]
    problem.grads[0] = torch.full((700,), math.nan, device=device)
    problem.launch(clip_coef=math.nan, found_inf=1.0)
    assert torch.equal(problem.params[0], before[0])
    assert torch.equal(problem.buffers[0], before[1])


def test_weight_decay_zero_is_no_decay_even_of_infinity(device: torch.device) -> None:
    problem = Problem(device, of(FLOAT, OPTIONS[0]), [OPTIONS[0]], sizes=(300,))
    problem.params[0].fill_(math.inf)
    problem.launch()
    assert torch.equal(problem.params[0], torch.full((300,), math.inf, device=device))


def test_gradients_are_written_back_only_where_clipping_bites(device: torch.device) -> None:
    problem = Problem(device, KINDS[0], [OPTIONS[1]], sizes=SIZES)
    before = [g.clone() for g in problem.grads if g is not None]
    problem.launch(clip_coef=1.0)
    for grad, same in zip(problem.grads, before, strict=True):
        assert torch.equal(grad, same)
    problem.launch_and_check(clip_coef=0.5)


@pytest.mark.parametrize(("half", "below"), [(torch.bfloat16, 2.0**-10), (torch.float16, 2.0**-13)])
def test_a_master_follows_a_parameter_that_was_written_to(
    device: torch.device, half: torch.dtype, below: float
) -> None:
    problem = Problem(device, Kind(torch.float32, half, None, None, half), [OPTIONS[0]], sizes=(600,))
    problem.params[0].mul_(1 + below)  # less than half a unit in the last place of the parameter: it stays the same
    kept = problem.params[0].clone()
    problem.lows[0][300:] = 5.0
    problem.grads[0] = torch.zeros(600, device=device, dtype=half)
    problem.launch()
    assert torch.equal(problem.params[0][:300], kept[:300])
    assert torch.equal(problem.params[0][300:], torch.full((300,), 5.0, device=device))


@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 2_500), min_size=1, max_size=4).map(tuple),
    offsets=st.integers(0, 7),
    kind=st.sampled_from(KINDS),
    switches=st.tuples(*[st.booleans()] * 4),
    options=st.sampled_from(OPTIONS),
    coef=st.sampled_from([1.0, 0.25, 0.0]),
)
def test_any_combination(
    device: torch.device,
    sizes: tuple[int, ...],
    offsets: int,
    kind: Kind,
    switches: tuple[bool, bool, bool, bool],
    options: dict[str, Any],
    coef: float,
) -> None:
    clip, write_back, maximize, average = switches
    kind = dataclasses.replace(of(kind, options), clip=clip, write_back=clip and write_back, maximize=maximize)
    kind = kind if average else dataclasses.replace(kind, average=None)
    problem = Problem(device, kind, [options, {**options, "lr": 0.5}], sizes=sizes)
    problem.grads = [randn(n, device, kind.grad, offset=offsets) for n in sizes]
    problem.launch_and_check(clip_coef=coef, ema_momentum=0.25)
