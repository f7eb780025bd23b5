"""Recipe auto: training goes on while a process compiles; a graph takes over if it pays; a failure is one warning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from step.runs import graph_of, interpret, make, train
from step.zoo import ZOO, vectors

from fastrunner.step import auto, background
from fastrunner.step.background import Job, whole_order
from fastrunner.step.torch_private import trace

MLP = ZOO["mlp"]


class FakeJob:
    """Says after ``polls`` questions what it was told to."""

    def __init__(self, *args, polls=3, result=""):
        self.left, self.result, self.closed = polls, result, False

    def poll(self):
        self.left -= 1
        return None if self.left > 0 else self.result

    def close(self):
        self.closed = True


def run(monkeypatch, iters=24, gain=-1e9, **job):
    """A run under auto with interpreted graphs, which are slow: ``gain`` decides whether they take over."""
    interpret(monkeypatch)
    jobs = []

    def start(*args):
        jobs.append(FakeJob(**job))
        return jobs[-1]

    monkeypatch.setattr(auto, "Job", start)
    monkeypatch.setattr(auto, "GAIN", gain)
    runner, losses = train(MLP, "auto", iters)
    return runner, losses, jobs


def test_a_graph_takes_over_when_it_is_ready_and_pays(monkeypatch):
    runner, losses, jobs = run(monkeypatch, polls=6)
    assert len(jobs) == 1
    assert 10 <= graph_of(runner).num_calls <= 18  # the first iterations were the recipe's below
    assert "as a graph" in graph_of(runner).explain()[0]
    assert losses == pytest.approx(train(MLP, "eager", 24)[1], rel=1e-5)


def test_a_graph_that_does_not_pay_stays_away_without_a_warning(monkeypatch, caplog):
    runner, losses, _ = run(monkeypatch, gain=1.0)
    assert graph_of(runner).num_calls == 0
    assert any("would not pay" in line for line in graph_of(runner).explain())
    assert "no graph" not in caplog.text
    assert losses == train(MLP, "fused", 24)[1]


@pytest.mark.parametrize("why", ["the compiling process died of signal 9", "compiling took longer than 1800 s"])
def test_a_compile_that_fails_is_one_warning(why, monkeypatch, caplog):
    runner, losses, _ = run(monkeypatch, result=why)
    assert graph_of(runner).num_calls == 0
    assert len([r for r in caplog.records if why in r.getMessage()]) == 1
    assert losses == train(MLP, "fused", 24)[1]


def test_a_full_disk_is_one_warning(monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(auto, "Job", full)
    _, losses = train(MLP, "auto")
    assert len([r for r in caplog.records if "No space left" in r.getMessage()]) == 1
    assert losses == train(MLP, "fused")[1]


def test_the_end_of_a_run_ends_the_compile(monkeypatch):
    _, _, (job,) = run(monkeypatch, iters=8, polls=100)
    assert job.closed


def tiny():
    def body(a, b):
        a.add_(b)
        return (a.sum(),)

    args = (torch.ones(3), torch.ones(3))
    return trace(body, args, lambda: None), args


def test_a_process_that_dies_or_never_ends_is_told_of(monkeypatch):
    popen = subprocess.Popen

    def stuck(command, **kwargs):
        return popen([sys.executable, "-c", "import time; time.sleep(60)"], **kwargs)

    monkeypatch.setattr(background.subprocess, "Popen", stuck)
    late = Job(whole_order(*tiny()), timeout_s=0.0)
    assert "longer than 0 s" in late.poll()
    assert late._process.returncode is not None  # ended, not left behind
    killed = Job(whole_order(*tiny()))
    assert killed.poll() is None
    os.killpg(killed._process.pid, signal.SIGKILL)
    killed._process.wait()
    assert "signal 9" in killed.poll()
    assert not killed._errors.parent.exists()


def test_what_the_process_says_last_is_the_reason(monkeypatch):
    popen = subprocess.Popen

    def fails(command, **kwargs):
        return popen([sys.executable, "-c", "raise SystemExit('no C++ compiler')"], **kwargs)

    monkeypatch.setattr(background.subprocess, "Popen", fails)
    job = Job(whole_order(*tiny()))
    job._process.wait()
    assert job.poll() == "compiling failed: no C++ compiler"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_other_process_compiles_and_this_one_finds_it(inductor_cache, monkeypatch):
    monkeypatch.setattr(auto, "GAIN", -1e9)
    runner, _ = make(MLP, "auto", iters=10**6)
    begin = time.monotonic()

    class Source(list):
        """Batches until a graph has run, for a while."""

        def __iter__(self):
            while time.monotonic() - begin < 400:
                yield from (vectors(i) for i in range(4))
                if graph_of(runner).num_calls > 20:
                    runner.stop("seen")

    runner.run([Source(range(4))], [("train", 1)])
    assert graph_of(runner).num_calls > 20, graph_of(runner).explain()
