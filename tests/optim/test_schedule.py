"""The policies' formulas against torch.optim.lr_scheduler's, and against what must hold for any numbers.

Equality with mmcv to the last bit is tests/runner/test_golden_policies.py's; torch computes in another order, so the
comparisons here allow for rounding (rel=1e-9: some of torch's are recursions over the whole run).
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fastrunner.optim import schedule

BASE = 0.3
IDS = (
    *("step", "steps", "exp", "poly", "inv", "cosine", "linear", "flat cosine", "cosine restart"),
    *("linear warmup", "constant warmup"),
)
values = st.floats(1e-6, 10.0)


def torch_lrs(make, steps):
    """lr of each of so many steps under the scheduler ``make(optimizer)``."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    scheduler, lrs = make(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step of the optimizer is taken
        for _ in range(steps):
            lrs.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return lrs


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda p: schedule.step_value(BASE, p, 4, 0.5, None), lambda o: lr_scheduler.StepLR(o, 4, gamma=0.5)),
        (
            lambda p: schedule.step_value(BASE, p, [3, 11, 12], 0.1, None),
            lambda o: lr_scheduler.MultiStepLR(o, [3, 11, 12], gamma=0.1),
        ),
        (lambda p: schedule.exp_value(BASE, p, 0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        (
            lambda p: schedule.poly_value(BASE, p, 30, 0.9, 0.0),
            lambda o: lr_scheduler.PolynomialLR(o, total_iters=30, power=0.9),
        ),
        (
            lambda p: schedule.inv_value(BASE, p, 0.3, 0.75),
            lambda o: lr_scheduler.LambdaLR(o, lambda p: math.exp(-0.75 * math.log1p(0.3 * p))),
        ),
        (
            lambda p: schedule.cosine_value(BASE, 0.01, p, 30),
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30, eta_min=0.01),
        ),
        (
            lambda p: schedule.linear_value(BASE, BASE * 0.2, p, 30),
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=30),
        ),
        (
            lambda p: schedule.flat_cosine_value(BASE, 0.01, p, 30, 0.4),
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.CosineAnnealingLR(o, 18, eta_min=0.01)], [12]
            ),
        ),
        (
            lambda p: schedule.cosine_restart_value(BASE, 0.01, p, [5, 10, 20], [5, 15, 35], [1, 1, 1]),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2, eta_min=0.01),
        ),
        (
            lambda p: BASE * (schedule.warmup_factor("linear", p, 10, 0.2) if p < 10 else 1),
            lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=10),
        ),
        (
            lambda p: BASE * (schedule.warmup_factor("constant", p, 10, 0.2) if p < 10 else 1),
            lambda o: lr_scheduler.ConstantLR(o, factor=0.2, total_iters=10),
        ),
    ],
    ids=IDS,
)
def test_policies_agree_with_torch(ours, torchs):
    assert [ours(p) for p in range(30)] == pytest.approx(torch_lrs(torchs, 30), rel=1e-9)


@given(values, values, st.floats(0, 1))
def test_annealing_stays_between_its_ends(start, end, factor):
    low, high = min(start, end), max(start, end)
    slack = 4 * math.ulp(high)  # of the sums
    for anneal in (schedule.annealing_cos, schedule.annealing_linear):
        assert anneal(start, end, 0) == pytest.approx(start, abs=slack)
        assert anneal(start, end, 1) == pytest.approx(end, abs=slack)
        assert low - slack <= anneal(start, end, factor) <= high + slack


@given(values, values, st.floats(0, 1))
def test_annealing_is_symmetric(start, end, factor):
    slack = 8 * math.ulp(max(start, end))
    for anneal in (schedule.annealing_cos, schedule.annealing_linear):
        there, back = anneal(start, end, factor), anneal(start, end, 1 - factor)
        assert there + back == pytest.approx(start + end, abs=slack)


def test_the_weight_of_a_cosine_moves_its_start():
    assert schedule.annealing_cos(1.0, 0.2, 0, weight=0.5) == pytest.approx(0.6)
    assert schedule.annealing_cos(1.0, 0.2, 1, weight=0.5) == pytest.approx(0.2)


@given(st.sampled_from(schedule.WARMUPS), st.integers(1, 1000), st.floats(1e-3, 1))
def test_warmup_starts_at_the_ratio_and_never_falls(kind, length, ratio):
    factors = [schedule.warmup_factor(kind, i, length, ratio) for i in range(length)]
    assert factors[0] == pytest.approx(ratio)
    assert all(later >= earlier for earlier, later in pairwise(factors))
    assert factors[-1] <= 1


@given(st.integers(2, 100), st.floats(1e-3, 1))
def test_exponential_warmup_grows_by_one_factor(length, ratio):
    factors = [schedule.warmup_factor("exp", i, length, ratio) for i in range(length + 1)]
    growth = [later / earlier for earlier, later in pairwise(factors)]
    assert growth == pytest.approx([ratio ** (-1 / length)] * length)
    assert factors[-1] == 1


def test_warmup_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"warmup must be one of .*'quadratic'"):
        schedule.warmup_factor("quadratic", 0, 5, 0.1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_positions_in_periods(periods, data):
    ends = [sum(periods[: i + 1]) for i in range(len(periods))]
    owners = [i for i, period in enumerate(periods) for _ in range(period)]  # written out, one entry an iteration
    iteration = data.draw(st.integers(0, len(owners) - 1))
    assert schedule.get_position_from_periods(iteration, ends) == owners[iteration]
    with pytest.raises(ValueError, match=f"progress {ends[-1]} is behind the last period, which ends at {ends[-1]}"):
        schedule.get_position_from_periods(ends[-1], ends)


def test_steps_in_the_order_given():
    at = [schedule.step_value(1.0, p, [3, 2], 0.5, None) for p in range(5)]
    assert at == [1.0, 1.0, 1.0, 0.25, 0.25]  # the entry 2 counts only once 3 is passed: as mmcv
    assert [schedule.step_value(1.0, p, 1, 0.5, 0.3) for p in range(3)] == [1.0, 0.5, 0.3]


def test_poly_behind_its_end_is_no_complex_number():
    assert schedule.poly_value(1.0, 12, 10, 2.0, 0.0) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="progress 12 is behind the end of the run, 10"):
        schedule.poly_value(1.0, 12, 10, 0.9, 0.0)
