"""ProfilerHook: what it profiles, when it ends, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from runner.helpers import TinyModel, batches
from torch.profiler import ProfilerActivity

from fastrunner import ClosureHook, EpochBasedRunner, IterBasedRunner, ProfilerHook
from fastrunner.plan.due import DuePoints

CPU = ["cpu"]


def run(kind, hook, length=None, **hooks):
    length = length or (dict(max_epochs=2) if kind is EpochBasedRunner else dict(max_iters=6))
    runner = kind(TinyModel(), work_dir="out", **length)
    runner.register_profiler_hook(hook)
    for stage, fn in hooks.items():
        runner.register_hook(ClosureHook(stage, fn))
    runner.run([batches(3)], [("train", 1)])
    return runner


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
def test_the_first_iterations_are_in_the_trace_and_the_others_are_not(kind):
    hook = ProfilerHook(by_epoch=False, profile_iters=2, activities=CPU, json_trace_path="trace.json")
    on = []
    run(kind, hook, before_train_iter=lambda r: on.append(hook.profiler is not None))
    assert on == [True, True, False, False, False, False]
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::linear" for event in events) == 2  # one forward pass an iteration


def test_by_epoch():
    hook = ProfilerHook(profile_iters=1, activities=CPU)
    on = []
    with pytest.warns(UserWarning, match="profiling whole epochs"):
        run(EpochBasedRunner, hook, before_train_iter=lambda r: on.append(hook.profiler is not None))
    assert on == [True] * 3 + [False] * 3


def test_it_is_not_called_any_more_when_it_has_ended(monkeypatch):
    hook = ProfilerHook(by_epoch=False, profile_iters=1, activities=CPU)
    calls, inner = [], DuePoints.called

    def spy(points, runner):
        called, at = inner(points, runner)
        calls.append(any(each is hook for each in called))
        return called, at

    monkeypatch.setattr(DuePoints, "called", spy)
    run(IterBasedRunner, hook)
    assert calls[0]
    assert not any(calls[1:])


def test_a_schedule_and_handlers(capsys):
    ready = Mock()
    schedule = dict(wait=1, warmup=1, active=1)
    run(IterBasedRunner, dict(by_epoch=False, profile_iters=6, activities=CPU, schedule=schedule, on_trace_ready=ready))
    assert ready.call_count == 2
    handler = dict(type="log_trace", sort_by="self_cpu_time_total", row_limit=5)
    run(IterBasedRunner, dict(by_epoch=False, activities=CPU, on_trace_ready=handler))
    assert "Self CPU" in capsys.readouterr().out
    run(IterBasedRunner, dict(by_epoch=False, activities=CPU, on_trace_ready=dict(type="tb_trace")))
    assert len(list(Path("out/tf_tracing_logs").iterdir())) == 1
    run(IterBasedRunner, dict(by_epoch=False, activities=CPU, on_trace_ready=dict(type="tb_trace", dir_name="mine")))
    assert len(list(Path("out/mine").iterdir())) == 1


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
def test_a_run_that_ends_early_leaves_no_profiler_behind(kind):
    ready = Mock()
    hook = ProfilerHook(by_epoch=False, profile_iters=5, activities=CPU, on_trace_ready=ready)
    run(kind, hook, after_train_iter=lambda r: r.stop("enough"))
    assert (hook.profiler, ready.call_count) == (None, 1)
    hook = ProfilerHook(by_epoch=False, profile_iters=5, activities=CPU, on_trace_ready=ready)
    with pytest.raises(ZeroDivisionError):
        run(kind, hook, after_train_iter=lambda r: 1 / 0)
    assert (hook.profiler, ready.call_count) == (None, 1)
    run(kind, ProfilerHook(by_epoch=False, profile_iters=1, activities=CPU))  # another one can start


def test_a_resumed_run_profiles_its_own_first_iterations():
    hook = ProfilerHook(by_epoch=False, profile_iters=1, activities=CPU)
    runner = IterBasedRunner(TinyModel(), max_iters=6)
    runner.register_profiler_hook(hook)
    runner._iter = 4
    on = []
    runner.register_hook(ClosureHook("before_train_iter", lambda r: on.append(hook.profiler is not None)))
    runner.run([batches(3)], [("train", 1)])
    assert on == [True, False]


def test_activities_in_any_case():
    assert ProfilerHook(activities=["CPU"]).activities == [ProfilerActivity.CPU]
    assert ProfilerActivity.CPU in ProfilerHook().activities


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(by_epoch=1), TypeError, "by_epoch must be a bool"),
        (dict(profile_iters=0), ValueError, "profile_iters must be an int >= 1"),
        (dict(activities="cpu"), ValueError, "activities must be a list"),
        (dict(activities=["tpu"]), ValueError, '"cpu" or "cuda", got \'tpu\''),
        (dict(on_trace_ready=3), ValueError, "on_trace_ready must be a callable"),
        (dict(on_trace_ready=dict(type="x")), ValueError, "needs type="),
        (dict(schedule=dict(wait=1)), TypeError, "active"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        ProfilerHook(**arguments)


def test_more_than_the_run_is_long():
    with pytest.raises(ValueError, match="profile_iters=7 is more than the run is long: max_iters=6"):
        run(IterBasedRunner, ProfilerHook(by_epoch=False, profile_iters=7))
    with pytest.raises(ValueError, match="counts in max_epochs, which this runner has not"):
        run(IterBasedRunner, ProfilerHook())
