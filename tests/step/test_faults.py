"""Compilers that are missing, die or never end, disks that are full, files that are damaged: training goes on with one
warning. With inductor and processes as they are; test_auto.py and test_compiled.py have the same without, in the quick
suite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from step.runs import graph_of, make, train
from step.zoo import ZOO, vectors

from fastrunner.step import auto, background
from fastrunner.step.background import Job, whole_order
from fastrunner.step.torch_private import trace

MLP, BRANCH = ZOO["mlp"], ZOO["branch"]


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


def until(family, wanted, seconds=300):
    """Train under auto until ``wanted(runner)``, at most so long."""
    runner, losses = make(family, "auto", iters=10**6)
    begin = time.monotonic()

    class Source(list):
        def __iter__(self):
            while time.monotonic() - begin < seconds:
                yield from (vectors(i) for i in range(4))
                if wanted(runner):
                    runner.stop("seen")

    runner.run([Source(range(4))], [("train", 1)])
    return runner, losses.losses


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name.startswith("fastrunner")]


def refused(runner):
    return bool(graph_of(runner)._refused)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_other_process_compiles_and_this_one_finds_it(inductor_cache, monkeypatch):
    monkeypatch.setattr(auto, "GAIN", -1e9)
    runner, _ = until(MLP, lambda runner: graph_of(runner).num_calls > 20)
    assert graph_of(runner).num_calls > 20, runner.step.explain()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_modules_are_compiled_by_the_other_process(inductor_cache, monkeypatch):
    monkeypatch.setattr(auto, "GAIN", -1e9)
    runner, _ = until(BRANCH, lambda runner: runner.step._auto._parts and runner.step._auto._parts.took_over)
    assert runner.step._auto._parts.took_over, runner.step.explain()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["no compiler", "full disk", "killed", "endless"])
def test_auto_goes_on_below(fault, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    says = {"no compiler": "InvalidCxxCompiler", "full disk": "Error", "killed": "signal 9", "endless": "longer than 1"}
    if fault == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif fault == "full disk":
        (tmp_path / "code").write_text("")  # where a folder should be
    elif fault == "endless":
        monkeypatch.setattr(background, "TIMEOUT_S", 1.0)
    elif fault == "killed":
        popen = subprocess.Popen

        def dies(command, **kwargs):
            code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
            return popen([sys.executable, "-c", code], **kwargs)

        monkeypatch.setattr(background.subprocess, "Popen", dies)
    runner, _ = until(MLP, refused)
    assert len(warnings_of(caplog)) == 1
    assert says[fault] in warnings_of(caplog)[0]
    plain, _ = train(MLP, "fused", runner.iter)
    assert all(torch.equal(a, b) for a, b in zip(runner.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_compiler_and_damaged_code_under_recipe_compile(inductor_cache, tmp_path, monkeypatch, caplog):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        runner, losses = train(BRANCH, None, step="compile")
    assert "InvalidCxxCompiler" in runner.step._compiled.refused
    assert losses == train(BRANCH, "fused")[1]
    assert len(warnings_of(caplog)) == 1
    torch._dynamo.reset()
    first, wanted = train(BRANCH, None, step="compile")
    assert not first.step._compiled.refused
    damaged = [path for path in (tmp_path / "code").rglob("*") if path.is_file() and path.suffix != ".so"]
    for path in damaged:
        path.write_bytes(b"\x00damaged")
    torch._dynamo.reset()
    caplog.clear()
    again, losses = train(BRANCH, None, step="compile")
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert len(damaged) > 0
    assert len(warnings_of(caplog)) == bool(again.step._compiled.refused)
