"""A run that was stopped, broken or killed, and resumed, is the run that was not: samples, losses, weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data import resume_runs as runs

from fastrunner import ClosureHook

BACKENDS = {"arrays": (0, 1, 4), "torch": (0, 1, 4), "torch persistent": (1, 4), "dali": (1, 4), "foreign": (0, 1, 4)}
MATRIX = [(backend, workers) for backend, counts in BACKENDS.items() for workers in counts]
QUICK = {("arrays", 0), ("arrays", 4), ("torch", 0), ("torch", 1), ("dali", 1), ("foreign", 0), ("foreign", 1)}


def cases(quick):
    return [
        pytest.param(backend, workers, marks=[] if (backend, workers) in quick else pytest.mark.slow)
        for backend, workers in MATRIX
    ]


@pytest.fixture
def files(request, folder):
    return str(Path(folder.files[0]).parent)


def loader(backend, workers, files):
    if backend == "arrays":
        pytest.importorskip("numba", reason="numba is not installed")
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return runs.make_loader(backend, workers, files)


def assert_goes_on(whole, resumed, first):
    (trace, tensors), (rest, got) = whole, resumed
    assert [number for number, _, _ in rest] == list(range(first, len(trace)))
    assert rest == trace[first:]
    assert tensors.keys() == got.keys()
    assert all(torch.equal(tensors[name], got[name]) for name in tensors)


def stop(runner):
    runner.stop("enough")


def explode(runner):
    raise OSError("disk full, as if")


@pytest.mark.parametrize("kind", runs.KINDS)
@pytest.mark.parametrize(("backend", "workers"), cases(QUICK))
def test_stopped_or_broken(kind, backend, workers, files):
    whole = runs.train(kind, loader(backend, workers, files), "whole")
    assert sorted(i for _, ids, _ in whole[0][: runs.LENGTH] for i in ids) == list(range(runs.N))
    runs.train(kind, loader(backend, workers, files), "stopped", at_break=stop)
    resumed = runs.train(kind, loader(backend, workers, files), "stopped", resume="stopped/latest.pth")
    assert_goes_on(whole, resumed, runs.BREAK + 1)
    with pytest.raises(OSError, match="as if"):
        runs.train(kind, loader(backend, workers, files), "broken", at_break=explode)
    resumed = runs.train(kind, loader(backend, workers, files), "broken", resume="broken/latest.pth", early=True)
    assert_goes_on(whole, resumed, runs.SAVED)


@pytest.mark.parametrize("kind", runs.KINDS)
@pytest.mark.parametrize(("backend", "workers"), cases({("torch", 1)}))
def test_killed(kind, backend, workers, files):
    whole = runs.train(kind, loader(backend, workers, files), "whole")
    command = [sys.executable, runs.__file__, kind, backend, str(workers), "killed", files]
    # No pipes: the worker processes of who was killed look every 5 s whether it is there, and would keep them open.
    with open("errors", "w") as errors:
        done = subprocess.run(command, stdout=errors, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, Path("errors").read_text()
    resumed = runs.train(kind, loader(backend, workers, files), "killed", resume="killed/latest.pth")
    assert_goes_on(whole, resumed, runs.SAVED)


@pytest.mark.parametrize("backend", ["arrays", "torch", "dali"])
def test_the_number_of_workers_may_change_in_between(backend, files):
    whole = runs.train("epoch", loader(backend, 1, files), "whole")
    runs.train("epoch", loader(backend, 2, files), "stopped", at_break=stop)
    resumed = runs.train("epoch", loader(backend, 0, files), "stopped", resume="stopped/latest.pth")
    assert_goes_on(whole, resumed, runs.BREAK + 1)


@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_checkpoint_written_before_the_step_does_not_count_the_batch_in_hand(kind):
    def save(runner):
        if runner.iter == runs.BREAK:
            runner.save_checkpoint("early", filename_tmpl="early.pth")
            runner.stop("saved")

    whole = runs.train(kind, runs.make_loader("torch", 0, ""), "whole")
    real = runs.KINDS[kind].register_optimizer_hook

    def register(self, config):
        real(self, config)
        self.register_hook(ClosureHook("before_train_iter", save), priority="HIGHEST")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.KINDS[kind], "register_optimizer_hook", register)
        runs.train(kind, runs.make_loader("torch", 0, ""), "stopped")
    resumed = runs.train(kind, runs.make_loader("torch", 0, ""), "out", resume="early/early.pth")
    assert_goes_on(whole, resumed, runs.BREAK)
