"""runner.explain(): what it says is what happens; lines that read the host are found and counted."""

from __future__ import annotations

import logging

import pytest
import torch
from runner.helpers import TinyModel, batches

from fastrunner import EMAHook, EpochBasedRunner, FusedSGD, Hook, IterBasedRunner, OptimizerHook
from fastrunner.plan.host_reads import HostReads


class Acts(Hook):
    def after_train_iter(self, runner):
        pass


class Sometimes(Acts):
    def due(self, runner):
        return 500


class Mine(OptimizerHook):
    pass


def make(model=None, kind=IterBasedRunner, iters=40, hooks=(), optimizer_config=None, log_interval=100, **options):
    model = model or TinyModel()
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    length = dict(max_iters=iters) if kind is IterBasedRunner else dict(max_epochs=iters)
    runner = kind(model, optimizer=optimizer, logger=logging.Logger("quiet"), **length, **options)
    runner.register_training_hooks(
        dict(policy="step", step=[30], by_epoch=False),
        optimizer_config or dict(grad_clip=dict(max_norm=1.0)),
        dict(interval=1000, by_epoch=False, save_last=False),
        dict(interval=log_interval, hooks=[dict(type="TextLoggerHook", by_epoch=False)]),
    )
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def block(text: str, title: str) -> list[str]:
    """The rows under a title."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(f"  {title}")]
    if not starts:
        return []
    rows = []
    for line in lines[starts[0] + 1 :]:
        if not line.startswith("    "):
            break
        rows.append(" ".join(line.split()))
    return rows


def test_what_was_lowered_and_what_is_called_when():
    runner = make(hooks=[EMAHook(), Sometimes()])
    runner.run([batches()], [("train", 1)])
    text = runner.explain()
    part = block(text, "Part of the iteration")
    assert [row.split()[0] for row in part] == [
        "StepLrUpdaterHook", "IterTimerHook", "OptimizerHook", "EMAHook", "log_vars"
    ]  # fmt: skip
    assert "clip and step in one pass (FusedSGD)" in part[2]
    assert "Sometimes NORMAL next at iteration 500" in block(text, "Called when due")
    assert block(text, "Called at every iteration") == []
    assert block(text, "Not lowered") == []
    assert block(text, "Log lines are written") == ["off the loop's thread"]


def test_what_was_refused_and_why():
    text = make(hooks=[Acts()], optimizer_config=Mine(dict(max_norm=1.0))).explain()
    assert "Mine ABOVE_NORMAL a subclass of OptimizerHook" in block(text, "Not lowered")
    called = block(text, "Called at every iteration")
    assert "Acts NORMAL it does not say when it is due" in called
    assert "CheckpointHook NORMAL users' hooks may change what it looks at" in called
    assert block(text, "Log lines are written") == ["at once"]


def test_a_run_in_which_nothing_is_lowered_says_why(monkeypatch):
    class Own(IterBasedRunner):
        def run_iter(self, data_batch, train_mode, **kwargs):
            super().run_iter(data_batch, train_mode, **kwargs)

    reason = block(make(kind=IterBasedRunner).explain(), "Every hook is called as in MMCV")
    assert reason == []
    model = TinyModel()
    own = Own(model, optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=1)
    assert block(own.explain(), "Every hook is called as in MMCV") == ["Own has its own run_iter()"]
    monkeypatch.setenv("FASTRUNNER_PLAN", "off")
    assert block(make().explain(), "Every hook is called as in MMCV") == ["FASTRUNNER_PLAN=off"]


class ReadsHost(TinyModel):
    def train_step(self, data_batch, optimizer=None, **kwargs):
        outputs = super().train_step(data_batch, optimizer, **kwargs)
        outputs["log_vars"]["read"] = outputs["loss"].item()  # line A
        if outputs["loss"] > 0:  # line B
            outputs["loss"].detach().cpu()  # line C
            float(outputs["loss"])  # line D
        torch.nonzero(data_batch)  # line E
        return outputs


def line_of(mark: str) -> int:
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if line.rstrip().endswith(f"# line {mark}"))


@pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
def test_lines_that_read_the_host_are_counted(kind):
    runner = make(ReadsHost(), kind=kind, iters=40 if kind is IterBasedRunner else 14)
    assert block(runner.explain(), "Lines that read the host") == ["the next 10 iterations will be watched"]
    runner.run([batches()], [("train", 1)])
    assert runner.host_reads.lines == {(__file__, line_of(mark)): 10 for mark in "ABCDE"}
    rows = block(runner.explain(), "Lines that read the host")
    assert (
        f'{__file__}:{line_of("A")} 1 an iteration outputs["log_vars"]["read"] = outputs["loss"].item() # line A'
        in rows
    )


def test_watching_changes_nothing():
    weights = []
    for watch in (False, True):
        torch.manual_seed(0)
        runner = make()
        if watch:
            runner.explain()
        runner.run([batches()], [("train", 1)])
        weights.append(runner.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
def test_nothing_reads_the_host_between_logs(kind, monkeypatch):
    """All hooks of ours, tensors in log_vars: 40 iterations under watch, and not one read."""
    monkeypatch.setattr("fastrunner.plan.host_reads.WATCHED", 40)
    runner = make(kind=kind, iters=40 if kind is IterBasedRunner else 14, hooks=[EMAHook()])
    runner.explain()
    runner.run([batches()], [("train", 1)])
    assert runner.host_reads.watched == 40
    assert runner.host_reads.lines == {}


def test_a_log_that_is_due_is_named(monkeypatch):
    runner = make(log_interval=5)
    runner.explain()
    runner.run([batches()], [("train", 1)])
    assert [file for file, _ in runner.host_reads.lines] == ["a log that was due"]


def test_the_watch_sees_reads_inside_of_torch():
    reads = HostReads()
    reads.arm()
    runner = make()
    norm = torch.nn.utils.clip_grad_norm_
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    reads.watch(lambda _: norm([weight], 1.0, error_if_nonfinite=True), runner)  # it looks at its result
    assert list(reads.lines) == [(__file__, reads.lines and line_of_call())]


def line_of_call() -> int:
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if line.rstrip().endswith("# it looks at its result"))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
def test_a_gpu_is_never_waited_for_between_logs(kind):
    model = TinyModel().cuda()
    data = [batch.cuda() for batch in batches()]
    runner = make(model, kind=kind, iters=40 if kind is IterBasedRunner else 14, hooks=[EMAHook()])

    class Strict(Hook):
        def before_train_iter(self, runner):
            torch.cuda.set_sync_debug_mode("error" if runner.iter else "default")  # the first one may build tables

        def due(self, runner):
            return runner.iter if runner.iter < 2 else 10**9

    runner.register_hook(Strict(), "HIGHEST")
    try:
        runner.run([data], [("train", 1)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runner.iter >= 40
