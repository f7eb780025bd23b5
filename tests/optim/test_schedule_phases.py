"""Cyclic and one-cycle schedules against torch's schedulers (which round differently: rel=1e-9)."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fastrunner.optim.schedule_phases import ANNEAL, cyclic_phases, cyclic_value, find_phase, one_cycle_ends

BASE = 0.3


def torch_groups(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE, momentum=0.9)
    scheduler, rows = make(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step of the optimizer is taken
        for step in range(steps):
            rows.append({key: optimizer.param_groups[0][key] for key in ("lr", "momentum")})
            if step + 1 < steps:
                scheduler.step()
    return rows


@pytest.mark.parametrize(("mode", "gamma"), [("triangular", 1.0), ("triangular2", 0.5)])
@pytest.mark.parametrize(("cycle", "up"), [(10, 0.4), (10, 0.5), (7, 0.3)])
def test_a_linear_cycle_is_torchs_triangle(mode, gamma, cycle, up):
    turn = int(cycle * up)
    rows = torch_groups(
        lambda o: lr_scheduler.CyclicLR(
            o, BASE, 5 * BASE, step_size_up=turn, step_size_down=cycle - turn, mode=mode, cycle_momentum=False
        ),
        3 * cycle,
    )
    phases = cyclic_phases(cycle, up, (5, 1))
    ours = [cyclic_value(BASE, p, cycle, phases, gamma, ANNEAL["linear"]) for p in range(3 * cycle)]
    assert ours == pytest.approx([row["lr"] for row in rows], rel=1e-9)


@given(st.integers(1, 60), st.floats(0, 0.99), st.sampled_from(list(ANNEAL)), st.floats(0.1, 1), st.integers(0, 200))
def test_every_iteration_is_in_a_phase(cycle, up, anneal, gamma, progress):
    value = cyclic_value(1.0, progress, cycle, cyclic_phases(cycle, up, (4.0, 0.5)), gamma, ANNEAL[anneal])
    assert 0.5 - 1e-12 <= value <= 4.0 + 1e-12  # rounding of the annealing


@pytest.mark.parametrize("anneal", ANNEAL)
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("total", "pct_start"), [(10, 0.3), (37, 0.25), (100, 0.0), (20, 0.45)])
def test_one_cycle_is_torchs(anneal, three_phase, total, pct_start):
    rows = torch_groups(
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=total, pct_start=pct_start, anneal_strategy=anneal, div_factor=20,
            final_div_factor=50, three_phase=three_phase, base_momentum=0.8, max_momentum=0.95,
        ),
        total,
    )  # fmt: skip
    ends = one_cycle_ends(total, pct_start, three_phase)
    lrs = [(0.05, 1.0), (1.0, 0.05), (0.05, 0.001)] if three_phase else [(0.05, 1.0), (1.0, 0.001)]
    momenta = [(0.95, 0.8), (0.8, 0.95), (0.95, 0.95)]
    for progress, row in enumerate(rows):
        index, share = find_phase(progress, ends)
        assert ANNEAL[anneal](*lrs[index], share) == pytest.approx(row["lr"], rel=1e-9)
        assert ANNEAL[anneal](*momenta[index], share) == pytest.approx(row["momentum"], rel=1e-9)


@given(st.integers(1, 500), st.floats(0, 1), st.booleans())
def test_one_cycle_always_has_a_phase_or_says_why(total, pct_start, three_phase):
    if pct_start * total == 1:
        with pytest.raises(ValueError, match=r"use a larger pct_start, or 0\.0"):
            one_cycle_ends(total, pct_start, three_phase)
        return
    ends = one_cycle_ends(total, pct_start, three_phase)
    for progress in range(total):
        index, share = find_phase(progress, ends)
        assert progress <= ends[index]
        assert 0 <= share <= 1


def test_a_way_up_of_one_iteration_is_refused():
    with pytest.raises(ValueError, match=r"pct_start=0.1 of 10 iterations is a single one"):
        one_cycle_ends(10, 0.1, False)


def test_behind_the_end_the_last_phase_goes_on():
    assert find_phase(14, [4.0, 9]) == (1, 2.0)
    assert find_phase(14, [9.0, 9]) == (1, 1.0)  # it has no length
    assert math.isfinite(find_phase(0, [-1.0, 9])[1])
