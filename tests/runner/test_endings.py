"""Every way a run can end: what still fires, what the counters say, what the caller gets.

| ending                                   | what still fires                                       | run()            |
|------------------------------------------|--------------------------------------------------------|------------------|
| the limit is reached                     | everything, after_run last                             | returns          |
| ``runner.stop(reason)``                  | the rest of the iteration; the end of its epoch if it  | returns,         |
|                                          | was the last; after_run (iteration runner: after_epoch | stop_reason says |
|                                          | too, which is the end of its loop, not of an epoch)    |                  |
| exception in a hook, the model, a loader | nothing: no after_run, as in MMCV                      | raises           |
| KeyboardInterrupt                        | nothing                                                | raises           |

mmcv defines only the first and the fact that an exception fires nothing more; the traces are written by hand. A row is
stage, epoch, iter, inner_iter. Train loaders have 3 batches, val loaders 2.
"""

from __future__ import annotations

import pytest
from golden.parts import WORKFLOWS, Loader, Toy, make_logger, make_runner

import fastrunner
from fastrunner import Hook, HookError

LENGTH = {"epoch": 2, "iter": 4}
FULL = {
    ("epoch", "t1"): """
        before_run          0 0 0
        before_train_epoch  0 0 0
        before_train_iter   0 0 0
        after_train_iter    0 0 0
        before_train_iter   0 1 1
        after_train_iter    0 1 1
        before_train_iter   0 2 2
        after_train_iter    0 2 2
        after_train_epoch   0 3 2
        before_train_epoch  1 3 2
        before_train_iter   1 3 0
        after_train_iter    1 3 0
        before_train_iter   1 4 1
        after_train_iter    1 4 1
        before_train_iter   1 5 2
        after_train_iter    1 5 2
        after_train_epoch   1 6 2
        after_run           2 6 2
    """,
    ("epoch", "t2v1"): """
        before_run          0 0 0
        before_train_epoch  0 0 0
        before_train_iter   0 0 0
        after_train_iter    0 0 0
        before_train_iter   0 1 1
        after_train_iter    0 1 1
        before_train_iter   0 2 2
        after_train_iter    0 2 2
        after_train_epoch   0 3 2
        before_train_epoch  1 3 2
        before_train_iter   1 3 0
        after_train_iter    1 3 0
        before_train_iter   1 4 1
        after_train_iter    1 4 1
        before_train_iter   1 5 2
        after_train_iter    1 5 2
        after_train_epoch   1 6 2
        before_val_epoch    2 6 2
        before_val_iter     2 6 0
        after_val_iter      2 6 0
        before_val_iter     2 6 1
        after_val_iter      2 6 1
        after_val_epoch     2 6 1
        after_run           2 6 1
    """,
    ("iter", "t1"): """
        before_run          0 0 0
        before_epoch        0 0 0
        before_train_iter   0 0 0
        after_train_iter    0 0 0
        before_train_iter   0 1 0
        after_train_iter    0 1 0
        before_train_iter   0 2 0
        after_train_iter    0 2 0
        before_train_iter   1 3 0
        after_train_iter    1 3 0
        after_epoch         1 4 1
        after_run           1 4 1
    """,
    ("iter", "t2v1"): """
        before_run          0 0 0
        before_epoch        0 0 0
        before_train_iter   0 0 0
        after_train_iter    0 0 0
        before_train_iter   0 1 1
        after_train_iter    0 1 1
        before_val_iter     0 2 0
        after_val_iter      0 2 0
        before_train_iter   0 2 0
        after_train_iter    0 2 0
        before_train_iter   1 3 1
        after_train_iter    1 3 1
        before_val_iter     1 4 0
        after_val_iter      1 4 0
        after_epoch         1 4 1
        after_run           1 4 1
    """,
}
# kind, workflow, where stop() is called (a stage, and which call of it), what follows that call
STOPS = [
    ("epoch", "t1", "before_run", 1, """
        after_run           0 0 0
    """),
    ("epoch", "t1", "before_train_iter", 2, """
        after_train_iter    0 1 1
        after_run           0 2 1
    """),
    ("epoch", "t1", "after_train_iter", 2, """
        after_run           0 2 1
    """),
    ("epoch", "t1", "after_train_iter", 3, """
        after_train_epoch   0 3 2
        after_run           1 3 2
    """),
    ("epoch", "t1", "after_train_epoch", 1, """
        after_run           1 3 2
    """),
    ("epoch", "t1", "after_train_iter", 6, """
        after_train_epoch   1 6 2
        after_run           2 6 2
    """),
    ("epoch", "t2v1", "after_train_iter", 5, """
        after_run           1 5 1
    """),
    ("epoch", "t2v1", "after_train_epoch", 2, """
        after_run           2 6 2
    """),
    ("epoch", "t2v1", "before_val_iter", 1, """
        after_val_iter      2 6 0
        after_run           2 6 0
    """),
    ("epoch", "t2v1", "after_val_iter", 2, """
        after_val_epoch     2 6 1
        after_run           2 6 1
    """),
    ("iter", "t1", "before_run", 1, """
        before_epoch        0 0 0
        after_epoch         0 0 0
        after_run           0 0 0
    """),
    ("iter", "t1", "before_train_iter", 2, """
        after_train_iter    0 1 0
        after_epoch         0 2 1
        after_run           0 2 1
    """),
    ("iter", "t1", "after_train_iter", 3, """
        after_epoch         0 3 1
        after_run           0 3 1
    """),
    ("iter", "t2v1", "after_train_iter", 2, """
        after_epoch         0 2 2
        after_run           0 2 2
    """),
    ("iter", "t2v1", "after_val_iter", 1, """
        after_epoch         0 2 1
        after_run           0 2 1
    """),
]  # fmt: skip
# kind, workflow, where it breaks, rows that have fired by then, finished epochs and iterations
BREAKS = [
    ("epoch", "t1", "before_run", 1, 1, (0, 0)),
    ("epoch", "t1", "before_train_epoch", 2, 10, (1, 3)),
    ("epoch", "t1", "before_train_iter", 2, 5, (0, 1)),
    ("epoch", "t1", "after_train_iter", 2, 6, (0, 1)),
    ("epoch", "t1", "after_train_iter", 3, 8, (0, 2)),
    ("epoch", "t1", "after_train_epoch", 1, 9, (0, 3)),
    ("epoch", "t1", "after_run", 1, 18, (2, 6)),
    ("epoch", "t2v1", "before_val_epoch", 1, 18, (2, 6)),
    ("epoch", "t2v1", "before_val_iter", 2, 21, (2, 6)),
    ("epoch", "t2v1", "after_val_iter", 1, 20, (2, 6)),
    ("epoch", "t2v1", "after_val_epoch", 1, 23, (2, 6)),
    ("iter", "t1", "before_run", 1, 1, (0, 0)),
    ("iter", "t1", "before_epoch", 1, 2, (0, 0)),
    ("iter", "t1", "after_train_iter", 4, 10, (1, 3)),
    ("iter", "t1", "after_epoch", 1, 11, (1, 4)),
    ("iter", "t1", "after_run", 1, 12, (1, 4)),
    ("iter", "t2v1", "before_train_iter", 3, 9, (0, 2)),
    ("iter", "t2v1", "after_val_iter", 1, 8, (0, 2)),
]
# kind, workflow, what breaks and at which call of it, rows that have fired by then, finished epochs and iterations
INNER_BREAKS = [
    ("epoch", "t1", "train_step", 2, 5, (0, 1)),
    ("epoch", "t1", "train_step", 4, 11, (1, 3)),
    ("epoch", "t2v1", "val_step", 1, 19, (2, 6)),
    ("epoch", "t1", "train loader", 1, 2, (0, 0)),
    ("epoch", "t1", "train loader", 3, 6, (0, 2)),
    ("epoch", "t2v1", "val loader", 2, 20, (2, 6)),
    ("iter", "t1", "train_step", 2, 5, (0, 1)),
    ("iter", "t2v1", "val_step", 1, 7, (0, 2)),
    ("iter", "t1", "train loader", 1, 2, (0, 0)),
    ("iter", "t1", "train loader", 4, 8, (0, 3)),
    ("iter", "t2v1", "val loader", 1, 6, (0, 2)),
]


def rows(text):
    """The rows of a hand-written trace."""
    return [[stage, *map(int, counters)] for stage, *counters in map(str.split, text.strip().splitlines())]


class Probe(Hook):
    """Notes every stage, and acts at the n-th call of one."""

    def __init__(self, stage="", call=0, action=lambda runner: None):
        self.trace, self.closed = [], 0
        self.left = {stage: call}
        self.action = action

    def note(self, stage, runner):
        self.trace.append([stage, runner.epoch, runner.iter, runner.inner_iter])
        self.left[stage] = self.left.get(stage, 0) - 1
        if self.left[stage] == 0:
            self.action(runner)

    def close(self):
        self.closed += 1


for _stage in (*Hook.stages, "before_epoch", "after_epoch"):
    setattr(Probe, _stage, lambda self, runner, stage=_stage: self.note(stage, runner))


class Run:
    """A run with a probe in it; ``go()`` runs it."""

    def __init__(self, kind, workflow, probe, folder):
        self.model = Toy()
        self.logger, self.lines = make_logger()
        self.runner = make_runner(
            fastrunner, kind, LENGTH[kind], model=self.model, work_dir=str(folder), logger=self.logger
        )
        self.later = Probe()  # acts on nothing: what fires behind the probe that breaks
        self.runner.register_hook(probe)
        self.runner.register_hook(self.later, "LOW")
        self.workflow = WORKFLOWS[workflow]
        self.loaders = {mode: Loader(3 if mode == "train" else 2) for mode, _ in self.workflow}

    def go(self):
        return self.runner.run([self.loaders[mode] for mode, _ in self.workflow], self.workflow)


def fail(error):
    def action(runner):
        raise error

    return action


@pytest.mark.parametrize(("kind", "workflow"), FULL)
def test_limit(kind, workflow, tmp_path):
    probe = Probe()
    run = Run(kind, workflow, probe, tmp_path)
    assert run.go() is None
    assert probe.trace == run.later.trace == rows(FULL[kind, workflow])
    assert run.runner.stop_reason is None
    assert (probe.closed, run.later.closed) == (1, 1)


@pytest.mark.parametrize(
    ("kind", "workflow", "stage", "call", "tail"), STOPS, ids=lambda value: "then" if "\n" in str(value) else None
)
def test_stop(kind, workflow, stage, call, tail, tmp_path):
    probe = Probe(stage, call, lambda runner: runner.stop("enough"))
    run = Run(kind, workflow, probe, tmp_path)
    assert run.go() is None
    full = rows(FULL[kind, workflow])
    stopped_at = [k for k, row in enumerate(full) if row[0] == stage][call - 1]
    assert probe.trace == run.later.trace == full[: stopped_at + 1] + rows(tail)
    assert run.runner.stop_reason == "enough"
    assert any("enough" in line for line in run.lines)
    assert (probe.closed, run.later.closed) == (1, 1)


def test_a_stopped_runner_can_run_on(tmp_path):
    probe = Probe("after_train_iter", 2, lambda runner: runner.stop("a break"))
    run = Run("iter", "t1", probe, tmp_path)
    run.go()
    assert run.runner.iter == 2
    run.go()
    assert (run.runner.iter, run.runner.stop_reason) == (4, None)


# kind, workflow, the train iteration after which the run is stopped
RESUMES = [
    ("epoch", "t1", 2),
    ("epoch", "t1", 3),
    ("epoch", "t2v1", 2),
    ("epoch", "t2v1", 3),
    ("iter", "t1", 3),
    ("iter", "t2v1", 1),
    ("iter", "t2v1", 2),
]


@pytest.mark.parametrize(("kind", "workflow", "stop_after"), RESUMES)
def test_a_stopped_run_resumes_where_it_was(kind, workflow, stop_after, tmp_path):
    def steps(folder, *hooks, resume_from=None):
        run = Run(kind, workflow, Probe(), tmp_path / folder)
        run.runner.register_checkpoint_hook(dict(interval=-1, by_epoch=kind == "epoch"))
        for hook in hooks:
            run.runner.register_hook(hook)
        if resume_from:
            run.runner.resume(str(tmp_path / resume_from / "latest.pth"))
        run.go()
        return [row[:3] for row in run.later.trace if row[0].startswith("before") and row[0].endswith("iter")]

    stopping = Probe("after_train_iter", stop_after, lambda runner: runner.stop("a break"))
    assert steps("stopped", stopping) + steps("resumed", resume_from="stopped") == steps("whole")


@pytest.mark.parametrize(("kind", "workflow", "stop_after"), RESUMES)
def test_a_stopped_run_goes_on_with_the_next_run(kind, workflow, stop_after, tmp_path):
    def steps(run):
        return [row[:3] for row in run.later.trace if row[0].startswith("before") and row[0].endswith("iter")]

    run = Run(kind, workflow, Probe("after_train_iter", stop_after, lambda runner: runner.stop("a break")), tmp_path)
    run.go()
    assert run.runner.stop_reason == "a break"
    run.go()
    assert run.runner.stop_reason is None
    whole = Run(kind, workflow, Probe(), tmp_path)
    whole.go()
    assert steps(run) == steps(whole)


def test_who_writes_the_counters_after_a_stop_starts_over(tmp_path):
    run = Run("epoch", "t1", Probe("after_train_iter", 2, lambda runner: runner.stop("a break")), tmp_path)
    run.go()
    run.runner._iter = 0
    run.go()
    assert run.runner.iter == 6


@pytest.mark.parametrize("kind", ["epoch", "iter"])
def test_stopped_before_it_starts(kind, tmp_path):
    run = Run(kind, "t1", Probe(), tmp_path)
    run.runner.stop("a signal came")
    run.go()
    assert (run.runner.iter, run.runner.stop_reason) == (0, "a signal came")
    assert [row[0] for row in run.later.trace] == [row[0] for row in rows(FULL[kind, "t1"]) if "train" not in row[0]]
    run.go()
    assert run.runner.iter == {"epoch": 6, "iter": 4}[kind]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyError("key"), RuntimeError("CUDA error")], ids=repr)
@pytest.mark.parametrize(("kind", "workflow", "stage", "call", "fired", "finished"), BREAKS)
def test_exception_in_a_hook(kind, workflow, stage, call, fired, finished, error, tmp_path):
    probe = Probe(stage, call, fail(error))
    run = Run(kind, workflow, probe, tmp_path)
    with pytest.raises(HookError, match=rf"Probe\.{stage}") as caught:
        run.go()
    assert isinstance(caught.value, type(error))
    assert str(error) in str(caught.value)
    assert caught.value.__cause__ is error
    full = rows(FULL[kind, workflow])
    assert probe.trace == full[:fired]
    assert run.later.trace == full[: fired - 1]  # hooks behind the one that raised are not called
    assert (run.runner.epoch, run.runner.iter) == finished
    assert (probe.closed, run.later.closed) == (1, 1)


@pytest.mark.parametrize(("kind", "workflow", "stage", "call", "fired", "finished"), BREAKS)
def test_keyboard_interrupt_in_a_hook(kind, workflow, stage, call, fired, finished, tmp_path):
    interrupt = KeyboardInterrupt()
    probe = Probe(stage, call, fail(interrupt))
    run = Run(kind, workflow, probe, tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        run.go()
    assert caught.value is interrupt
    assert probe.trace == rows(FULL[kind, workflow])[:fired]
    assert (run.runner.epoch, run.runner.iter) == finished
    assert (probe.closed, run.later.closed) == (1, 1)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("kind", "workflow", "place", "call", "fired", "finished"), INNER_BREAKS)
def test_exception_in_the_model_or_a_loader(kind, workflow, place, call, fired, finished, error, tmp_path):
    probe = Probe()
    run = Run(kind, workflow, probe, tmp_path)
    seen = []

    def listen(event):
        seen.append(event)
        if len(seen) == call:
            raise error

    if place.endswith("loader"):
        run.loaders[place.split()[0]].log = lambda event: event.startswith("batch") and listen(event)
    else:
        run.model.log = lambda event: event.startswith(place) and listen(event)
    with pytest.raises(type(error)) as caught:
        run.go()
    assert caught.value is error  # as it was raised: nothing of ours is around it
    assert probe.trace == run.later.trace == rows(FULL[kind, workflow])[:fired]
    assert (run.runner.epoch, run.runner.iter) == finished
    assert (probe.closed, run.later.closed) == (1, 1)


class NeedsTwo(Exception):
    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = code


def test_an_exception_of_an_unusual_type_keeps_its_type(tmp_path):
    error = NeedsTwo(7, "why")
    run = Run("iter", "t1", Probe("after_train_iter", 1, fail(error)), tmp_path)
    with pytest.raises(NeedsTwo, match=r"Probe\.after_train_iter") as caught:
        run.go()
    assert isinstance(caught.value, HookError)
    assert (caught.value.code, caught.value.__cause__) == (7, error)
    assert (caught.value.hook, caught.value.stage) == ("Probe", "after_train_iter")


@pytest.mark.parametrize("kind", ["epoch", "iter"])
def test_after_an_error_the_run_can_be_repeated(kind, tmp_path):
    """The counters are those of finished work, so that running on makes up for what is missing."""
    probe = Probe("after_train_iter", 2, fail(ValueError("once")))
    run = Run(kind, "t1", probe, tmp_path)
    with pytest.raises(ValueError, match="once"):
        run.go()
    assert run.runner.iter == 1
    run.go()
    assert run.runner.iter == {"epoch": 7, "iter": 4}[kind]  # the epoch runner starts its unfinished epoch over
    assert (probe.closed, run.later.closed) == (2, 2)
