"""Recipe auto: what it tries and in which order, what takes over, what a second run knows; training sees none of it.

Graphs and compiled modules are interpreted here, and jobs are told how they end; test_faults.py has real processes.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from step.runs import graph_of, interpret, interpret_halves, make, state_of, train
from step.zoo import ZOO, Model, vectors
from torch import nn

from fastrunner.step import auto, compiled_beside, decisions, precision

MLP, BRANCH, RESNET = ZOO["mlp"], ZOO["branch"], ZOO["resnet"]
FREE = dict(recipe="auto", amp="auto", channels_last="auto")


class FakeJob:
    """Says after ``polls`` questions what it was told to."""

    def __init__(self, order, polls=3, result=""):
        self.left, self.result, self.closed = polls, result, False

    def poll(self):
        self.left -= 1
        return None if self.left > 0 else self.result

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def in_python(monkeypatch):
    torch._dynamo.reset()
    interpret(monkeypatch)
    interpret_halves(monkeypatch)
    yield
    torch._dynamo.reset()


@pytest.fixture
def jobs(monkeypatch):
    return faked(monkeypatch)


def faked(monkeypatch, gain=-1e9, **job):
    """Jobs that are told how they end; interpreted candidates are slow: ``gain`` decides whether they take over."""
    started = []

    def start(order):
        started.append(FakeJob(order, **job))
        return started[-1]

    for module in (auto, compiled_beside):
        monkeypatch.setattr(module, "Job", start)
    monkeypatch.setattr(auto, "GAIN", gain)
    return started


def told(runner):
    return "\n".join(runner.step.explain())


def test_a_graph_takes_over_when_it_is_ready_and_pays(monkeypatch):
    jobs = faked(monkeypatch, polls=6)
    runner, losses = train(MLP, "auto", 24)
    assert len(jobs) == 1
    assert 8 <= graph_of(runner).num_calls <= 17  # the first iterations were the recipe's below
    assert "us an iteration as a graph" in told(runner)
    assert losses == pytest.approx(train(MLP, "eager", 24)[1], rel=1e-5)


def test_what_does_not_pay_stays_away_without_a_warning(monkeypatch, caplog):
    jobs = faked(monkeypatch, gain=1.0)
    runner, losses = train(MLP, "auto", 30)
    assert len(jobs) == 2  # the graph, then modules
    assert graph_of(runner).num_calls == 0
    assert told(runner).count("would not pay") == 2
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert losses == train(MLP, "fused", 30)[1]


def test_modules_are_compiled_where_no_graph_fits(jobs):
    runner, losses = train(BRANCH, "auto", 30)
    assert len(jobs) == 1
    assert "with compiled modules" in told(runner)
    assert "a graph breaks at" in told(runner)
    assert runner.step._auto._parts.took_over
    assert losses == pytest.approx(train(BRANCH, "eager", 30)[1], rel=1e-5)


@pytest.mark.parametrize("family", [MLP, BRANCH], ids=["graph", "modules"])
@pytest.mark.parametrize("why", ["the compiling process died of signal 9", "compiling took longer than 1800 s"])
def test_a_compile_that_fails_is_one_warning(family, why, monkeypatch, caplog):
    faked(monkeypatch, result=why)
    _, losses = train(family, "auto", 30)
    assert len([r for r in caplog.records if r.levelname == "WARNING" and why in r.getMessage()]) == 1
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == (1 if family is MLP else 2)  # and the branch
    assert losses == train(family, "fused", 30)[1]
    assert not decisions.folder().exists()  # a fault is no decision


@pytest.mark.parametrize("family", [MLP, BRANCH], ids=["graph", "modules"])
def test_a_full_disk_is_one_warning(family, monkeypatch, caplog):
    def full(order):
        raise OSError(28, "No space left on device")

    for module in (auto, compiled_beside):
        monkeypatch.setattr(module, "Job", full)
    _, losses = train(family, "auto", 30)
    assert len([r for r in caplog.records if "No space left" in r.getMessage()]) == 1
    assert losses == train(family, "fused", 30)[1]


def test_the_end_of_a_run_ends_the_compile(monkeypatch):
    (job,) = [jobs := faked(monkeypatch, polls=100), train(MLP, "auto", 8), jobs][2]
    assert job.closed
    (job,) = [jobs := faked(monkeypatch, polls=100), train(BRANCH, "auto", 24), jobs][2]
    assert job.closed


@pytest.mark.parametrize("name", ["mlp", "resnet", "autoencoder", "gpt"])  # Adam, BatchNorm, dropout, tied weights
def test_training_does_not_see_the_trials(name, monkeypatch):
    faked(monkeypatch, gain=1.0)  # all is measured, nothing is taken
    tried, losses = train(ZOO[name], None, 24, step=FREE)
    after = torch.get_rng_state()
    plain, wanted = train(ZOO[name], "fused", 24)
    assert "ms an iteration" in told(tried)
    assert losses == wanted
    assert torch.equal(after, torch.get_rng_state())
    for key, value in state_of(plain).items():
        assert torch.equal(state_of(tried)[key], value), key
        assert state_of(tried)[key].stride() == value.stride(), key
    assert all(p.grad is not None for p in tried.model.parameters() if p.requires_grad and name != "recommender")


def prefer(monkeypatch, amp, channels_last):
    def seconds(sides, rounds):
        for run in sides.values():
            run()
        return {way: 1.0 if (way.amp, way.channels_last) == (amp, channels_last) else 2.0 for way in sides}

    monkeypatch.setattr(precision, "timed", seconds)


@pytest.mark.parametrize("way", [("bf16", False), (None, True), ("bf16", True)])
def test_the_fastest_precision_and_layout_are_taken(way, monkeypatch):
    faked(monkeypatch, gain=0.05, result="stop here")
    prefer(monkeypatch, *way)
    runner, losses = train(RESNET, None, 10, step=FREE)
    stepping = runner.step._auto.stepping
    assert (stepping.amp, stepping.channels_last) == way
    weight = next(p for p in runner.model.parameters() if p.dim() == 4)
    momentum = runner.optimizer.state[weight]["momentum_buffer"]
    for tensor in (weight, momentum):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == way[1]
    rtol = 1e-4 if way[0] is None else 5e-2  # another order of sums; bfloat16's 8 bits over 10 iterations
    assert losses == pytest.approx(train(RESNET, "fused", 10)[1], rel=rtol)


def test_without_images_no_layout_is_tried():
    model = MLP.model()
    assert [str(way) for way in precision.ways(auto.StepConfig(**FREE), model)] == ["as it is", "bf16"]


def test_a_precision_that_breaks_the_model_is_not_taken(monkeypatch):
    class Fragile(Model):
        def train_step(self, batch, optimizer=None, **kwargs):
            outputs = super().train_step(batch, optimizer)
            scale = 1e9 if torch.is_autocast_enabled("cpu") else 1.0
            return dict(outputs, loss=outputs["loss"] * scale)

    faked(monkeypatch, result="stop here")
    prefer(monkeypatch, "bf16", False)
    runner, _ = train(replace(BRANCH, model=lambda: Fragile(nn.Linear(16, 10))), None, 8, step=FREE)
    assert runner.step._auto.stepping.amp is None
    assert "bf16: the loss is another by" in told(runner)


def test_a_step_that_cannot_be_run_twice_is_left_alone(jobs):
    class Counts(Model):
        calls = 0

        def train_step(self, batch, optimizer=None, **kwargs):
            self.calls += 1
            return super().train_step(batch, optimizer)

    runner, _ = train(replace(MLP, model=lambda: Counts(nn.Linear(16, 10))), None, 30, step=FREE)
    assert runner.model.calls == 30
    assert jobs == []
    assert "nothing is tried" in told(runner)


@pytest.mark.parametrize(("family", "recipe"), [(MLP, "graph"), (BRANCH, "compile")], ids=["graph", "modules"])
def test_a_second_run_does_not_measure_again(family, recipe, monkeypatch):
    jobs = faked(monkeypatch)
    prefer(monkeypatch, "bf16", False)
    first, _ = train(family, None, 30, step=FREE)

    def fail(*args, **kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr(precision, "timed", fail)
    monkeypatch.setattr(auto, "timed", fail)
    monkeypatch.setattr(auto.time, "perf_counter", time.perf_counter)
    del jobs[:]
    second, _ = train(family, None, 30, step=FREE)
    assert f"decided by an earlier run: {recipe}" in told(second)
    assert second.step._auto.stepping.amp == "bf16"
    assert len(jobs) == 1  # inductor's cache has it, which this process does not know
    if recipe == "graph":
        assert graph_of(second).num_calls > graph_of(first).num_calls
    else:
        assert second.step._auto._parts.took_over


def test_a_second_run_that_knows_of_nothing_faster_starts_nothing(monkeypatch):
    jobs = faked(monkeypatch, gain=1.0)
    train(MLP, "auto", 34)
    del jobs[:]
    runner, losses = train(MLP, "auto", 12)
    assert "decided by an earlier run: fused" in told(runner)
    assert graph_of(runner)._binding is None  # nor does an iteration look at anything any more
    assert jobs == []
    assert losses == train(MLP, "fused", 12)[1]


def test_a_model_with_new_shapes_all_the_time_goes_on_below(jobs, caplog):
    batches = [vectors(i, size=2 + i) for i in range(30)]
    runner, losses = train(MLP, "auto", 30, batches=batches)
    assert losses == pytest.approx(train(MLP, "eager", 30, batches=batches)[1], rel=1e-5)
    assert graph_of(runner).num_calls == 0
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) <= 1


def test_several_optimizers_stay_below_and_say_so(jobs):
    runner, _ = make(MLP, "auto")
    runner.optimizer = dict(a=runner.optimizer)
    assert "it drives one optimizer, the runner has dict" in told(runner)
