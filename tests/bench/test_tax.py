"""The runner tax: both sides really do the same, and a planted tax is found."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from fastrunner import ClosureHook, supervised
from fastrunner.bench import measure, tax
from fastrunner.bench.measure import Window
from fastrunner.bench.tax import NoopModel, NoopOptimizer, noop_tax, step_tax
from fastrunner.optim import build_optimizer

LOGGER = logging.Logger("quiet", logging.CRITICAL)


def problem():
    torch.manual_seed(0)
    model = supervised(nn.Linear(6, 3), nn.CrossEntropyLoss())
    optimizer = build_optimizer(model, {"type": "FusedSGD", "lr": 0.5, "momentum": 0.9})
    batches = [{"img": 10 * torch.randn(4, 6), "gt_label": torch.tensor([0, 1, 2, 0])} for _ in range(3)]
    return model, optimizer, batches


@pytest.mark.parametrize("runner", ["iter", "epoch"])
def test_both_sides_compute_the_same(runner, tmp_path, monkeypatch):
    """The runner's share of a comparison leaves the weights that the bare loop's share leaves."""
    weights = {}

    def compare(by_hand, by_runner, batches, num_iters, *rest):
        initial = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for name, loop in (("hand", by_hand), ("runner", by_runner)):
            model.load_state_dict(initial[0])
            optimizer.load_state_dict(copy.deepcopy(initial[1]))
            loop(Window(batches, num_iters))
            weights[name] = model.model.weight.detach().clone()
        return {}

    # The bare loop has no schedule, and the runner's first iteration is warm-up: without it the weights must be equal.
    constant = {"lr_config": {"policy": "fixed"}}
    model, optimizer, batches = problem()
    monkeypatch.setattr(tax, "_compare", compare)
    nothing_due = tax._nothing_due
    monkeypatch.setattr(tax, "_nothing_due", lambda *args: {**nothing_due(*args), **constant})
    step_tax(runner, model, optimizer, batches, num_iters=7, rounds=1, work_dir=tmp_path, logger=LOGGER)
    assert torch.equal(weights["hand"], weights["runner"])
    assert not torch.equal(weights["hand"], problem()[0].model.weight)
    assert not any(path.suffix == ".pth" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("runner", ["iter", "epoch"])
def test_step_tax_has_all_samples(runner, tmp_path):
    model, optimizer, batches = problem()
    found = step_tax(runner, model, optimizer, batches, num_iters=5, rounds=6, work_dir=tmp_path, logger=LOGGER)
    assert found["rounds"] == len(found["bare"]["samples_ns"]) == len(found["runner"]["samples_ns"]) == 6
    assert found["bare"]["min_ns"] > 0
    us = found["tax_us"]
    assert us["low"] <= us["median"] <= us["high"]
    assert us["confidence"] == pytest.approx(1 - 2 / 2**6)
    assert us["contains_zero"] == (us["low"] <= 0 <= us["high"])


@pytest.mark.parametrize("runner", ["iter", "epoch"])
def test_planted_tax_is_found(runner, tmp_path, monkeypatch):
    """On a clock that only the planted hook moves, by 300 us an iteration, the tax is 300 us; without it none."""
    make_runner = tax.make_runner
    now = [0]
    monkeypatch.setattr(measure, "perf_counter_ns", lambda: now[0])

    def dawdle(_):
        now[0] += 300_000

    def slower(*args, **kwargs):
        made = make_runner(*args, **kwargs)
        made.register_hook(ClosureHook("before_train_iter", dawdle))
        return made

    plain = noop_tax(runner, num_iters=50, rounds=9, work_dir=tmp_path, logger=LOGGER)
    monkeypatch.setattr(tax, "make_runner", slower)
    planted = noop_tax(runner, num_iters=50, rounds=9, work_dir=tmp_path, logger=LOGGER)
    assert (plain["tax_us"]["median"], planted["tax_us"]["median"]) == (0, 300)
    assert plain["tax_us"]["contains_zero"]
    assert not planted["tax_us"]["contains_zero"]


def test_noop_step_changes_nothing_and_runs_the_default_hooks(tmp_path, monkeypatch):
    made = []
    make_runner = tax.make_runner
    monkeypatch.setattr(tax, "make_runner", lambda *a, **k: made.append(make_runner(*a, **k)) or made[-1])
    noop_tax("iter", num_iters=10, rounds=1, work_dir=tmp_path, logger=LOGGER)
    assert [type(hook).__name__ for hook in made[0].hooks] == [
        "StepLrUpdaterHook", "OptimizerHook", "CheckpointHook", "IterTimerHook", "TextLoggerHook",
    ]  # fmt: skip
    assert made[-1].iter == 12
    assert made[-1].model.weight.grad is None
    assert made[-1].model.weight.abs().sum() == 0
    assert not list(tmp_path.rglob("*.pth"))


def test_nothing_is_due_in_the_timed_iterations(tmp_path, monkeypatch):
    rates = []
    make_runner = tax.make_runner

    def watched(*args, **kwargs):
        made = make_runner(*args, **kwargs)
        made.register_hook(ClosureHook("after_train_iter", lambda runner: rates.append(runner.current_lr()[0])))
        return made

    monkeypatch.setattr(tax, "make_runner", watched)
    noop_tax("iter", num_iters=30, rounds=1, work_dir=tmp_path, logger=LOGGER)
    assert len(set(rates[-31:])) == 1  # all but the first of the run
    assert not list(tmp_path.rglob("*"))  # no log, no checkpoint


def test_noop_logging_logs(tmp_path):
    noop_tax("iter", num_iters=98, rounds=1, work_dir=tmp_path, logger=LOGGER, log_interval=50)
    (file,) = tmp_path.glob("*.log.json")
    iters = [line for line in file.read_text().splitlines() if '"iter": 50' in line or '"iter": 100' in line]
    assert len(iters) == 2


def test_noop_parts():
    model = NoopModel()
    outputs = model.train_step({})
    outputs["loss"].backward()
    assert model.outputs["loss"].grad is None
    # the method is shadowed on this one tensor only
    other = torch.ones((), requires_grad=True)
    other.backward()
    assert other.grad == 1
    optimizer = NoopOptimizer(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones(8)
    optimizer.step()
    optimizer.zero_grad()
    assert model.weight.tolist() == [0.0] * 8
    assert model.weight.grad is not None
    assert NoopOptimizer.step is not type(problem()[1]).step
    assert not hasattr(NoopOptimizer.step, "__wrapped__")  # torch's profiler range would be most of the floor
