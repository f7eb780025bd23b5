"""Hooks that say when they act next are called as often as hooks that are asked every time."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner.helpers import TinyModel, batches

from fastrunner import CheckpointHook, EpochBasedRunner, FusedSGD, Hook, IterBasedRunner, TextLoggerHook
from fastrunner.plan.dispatch import says_when
from fastrunner.plan.run_plan import RunPlan


def run(kind, plan, hooks=(), workflow=(("train", 1),), interval=3, checkpoint=None, by_epoch=False, work_dir="out"):
    """What a short run leaves behind: its log records without times, its files, its weights and lr."""
    torch.manual_seed(0)
    model = TinyModel()
    length = dict(max_iters=13) if kind is IterBasedRunner else dict(max_epochs=3)
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1, momentum=0.9), work_dir=work_dir, **length)
    runner.register_training_hooks(
        dict(policy="step", step=[4, 7], by_epoch=False, warmup="linear", warmup_iters=3),
        dict(grad_clip=dict(max_norm=0.5)),
        checkpoint or dict(interval=4, by_epoch=by_epoch),
        dict(interval=interval, hooks=[dict(type="TextLoggerHook", by_epoch=by_epoch, ignore_last=False)]),
    )
    for make_hook in hooks:
        runner.register_hook(make_hook())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRUNNER_PLAN", plan)
        runner.run([batches(5)] * len(workflow), list(workflow))
    logs = [json.loads(line) for path in Path(work_dir).glob("*.log.json") for line in path.read_text().splitlines()]
    logs = [{key: value for key, value in record.items() if "time" not in key} for record in logs]
    files = sorted(path.name for path in Path(work_dir).glob("*.pth"))
    weights = [p.tolist() for p in model.parameters()]
    return logs, files, weights, runner.optimizer.param_groups[0]["lr"]


def compare(kind, **options):
    folder = tempfile.mkdtemp(dir=".")
    planned, plain = (run(kind, plan, work_dir=f"{folder}/{plan}", **options) for plan in ("on", "off"))
    assert planned == plain
    return planned


@pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
@pytest.mark.parametrize("workflow", [(("train", 1),), (("train", 2), ("val", 1))])
@pytest.mark.parametrize(
    ("interval", "by_epoch"), [(1, False), (3, False), (5, False), (7, False), (2, True), (9, True)]
)
def test_same_logs_files_weights_as_without_a_plan(kind, workflow, interval, by_epoch):
    compare(kind, workflow=workflow, interval=interval, by_epoch=by_epoch)


class ChangesIntervals(Hook):
    """A user's hook that changes what built-in hooks had planned with."""

    def after_train_iter(self, runner):
        if runner.iter == 2:
            for hook in runner.hooks:
                if isinstance(hook, (CheckpointHook, TextLoggerHook)):
                    hook.interval = 2


class SetsLr(Hook):
    def after_train_iter(self, runner):
        runner.optimizer.param_groups[0]["lr"] = 7.0


class MakesReady(Hook):
    """As an evaluation does: puts a value into the output, which all loggers then log."""

    def after_train_iter(self, runner):
        if runner.iter % 4 == 1:
            runner.log_buffer.output["score"] = float(runner.iter)
            runner.log_buffer.ready = True


class TimedMakesReady(MakesReady):
    def due(self, runner):
        return runner.iter + (1 - runner.iter) % 4


class TimedChangesIntervals(ChangesIntervals):
    def due(self, runner):
        return 2 if runner.iter <= 2 else 10**9


@pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
@pytest.mark.parametrize("hook", [ChangesIntervals, SetsLr, MakesReady, TimedMakesReady, TimedChangesIntervals])
def test_what_users_hooks_leave_behind_is_noticed(kind, hook):
    compare(kind, hooks=[hook], interval=5)


class EveryThird(Hook):
    def __init__(self, offset):
        self.offset, self.called = offset, []

    def due(self, runner):
        return runner.iter + (self.offset - runner.iter) % 3

    def after_train_iter(self, runner):
        self.called.append(runner.iter)


def test_a_users_hook_is_called_exactly_when_it_is_due():
    for kind in (IterBasedRunner, EpochBasedRunner):
        hook = EveryThird(1)
        run(kind, "on", hooks=[lambda hook=hook: hook], interval=4, work_dir=kind.__name__)
        assert hook.called == [i for i in range(13 if kind is IterBasedRunner else 15) if i % 3 == 1]


class Spaced(Hook):
    """Says when relative to now; a point once named is kept until it comes, whatever else is due before."""

    def __init__(self):
        self.called = []

    def due(self, runner):
        return runner.iter + 4

    def after_train_iter(self, runner):
        self.called.append(runner.iter)


def test_a_point_once_named_is_kept():
    hook = Spaced()
    run(EpochBasedRunner, "on", hooks=[lambda: hook], interval=1)
    assert hook.called == [4, 9, 14]  # asked at 0, 5 and 10


def test_subclasses_and_mocks_are_not_trusted():
    class Sub(CheckpointHook):
        def after_train_iter(self, runner):
            pass

    class OnlyNamed(CheckpointHook):
        """Nothing changed."""

    class Own(Sub):
        def due(self, runner):
            return 0

    shadowed = CheckpointHook()
    shadowed.after_train_iter = lambda runner: None
    assert [says_when(h) for h in (CheckpointHook(), OnlyNamed(), Own())] == [True] * 3
    assert [says_when(h) for h in (Sub(), shadowed, Hook())] == [False] * 3


@pytest.mark.parametrize("at", [None, 2.5, "soon", True])
def test_a_due_that_is_not_a_number_is_named(at):
    class Vague(Hook):
        def due(self, runner):
            return at

        def after_train_iter(self, runner):
            pass

    with pytest.raises(TypeError, match=r"Vague\.due must return the number of the next iteration"):
        run(IterBasedRunner, "on", hooks=[Vague])


def test_a_due_in_the_past_means_now():
    class Past(EveryThird):
        def due(self, runner):
            return -5

    hook = Past(0)
    run(IterBasedRunner, "on", hooks=[lambda: hook])
    assert hook.called == list(range(13))


@pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
def test_the_times_of_all_iterations_are_logged(kind):
    torch.manual_seed(0)
    model = TinyModel()
    length = dict(max_iters=9) if kind is IterBasedRunner else dict(max_epochs=1)
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1), **length)
    runner.register_training_hooks(None, {}, dict(interval=4, by_epoch=False), None)
    begin = time.perf_counter()
    runner.run([batches(9)], [("train", 1)])
    took = time.perf_counter() - begin
    history = runner.log_buffer.val_history
    assert list(history) == ["data_time", "loss", "time"]
    assert len(history["time"]) == len(history["data_time"]) == len(history["loss"]) == 9
    assert all(0 <= waited <= whole for waited, whole in zip(history["data_time"], history["time"], strict=True))
    assert sum(history["time"]) <= took


def test_between_due_points_nothing_is_called():
    model = TinyModel()
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=100)
    log = dict(interval=10, hooks=[dict(type="TextLoggerHook")])
    runner.register_training_hooks(None, {}, dict(interval=40), log)
    plan = RunPlan(runner)
    due = []
    for runner._iter in range(42):
        if runner._iter >= plan.next_due and plan.at(runner) is not plan.quiet:
            due.append(runner._iter)
    assert due == [9, 19, 29, 39]


KINDS = st.sampled_from([IterBasedRunner, EpochBasedRunner])


@settings(max_examples=25, deadline=None)
@given(KINDS, st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans())
def test_random_intervals(kind, log_interval, checkpoint_interval, by_epoch, save_last):
    by_epoch = by_epoch and kind is EpochBasedRunner
    checkpoint = dict(interval=checkpoint_interval, by_epoch=by_epoch, save_last=save_last)
    compare(kind, interval=log_interval, checkpoint=checkpoint)
