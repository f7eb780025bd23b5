"""Random hooks, priorities and due points: the plan's run is MMCV's plain run, event by event and bit by bit."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner.helpers import TinyModel, batches

from fastrunner import EMAHook, EpochBasedRunner, FusedSGD, Hook, IterBasedRunner

STAGES = [*Hook.stages, "before_epoch", "after_epoch", "before_iter", "after_iter"]
# What a hook does to the run where it acts, besides saying that it did.
DEEDS = ("nothing", "scales the loss", "writes the lr", "moves a weight", "logs", "registers another", "removes itself")
ITERS = 11


class Trace(Hook):
    """Notes every call of its stages, and does its deed at ``at``."""

    def __init__(self, name, stages, deed, at, trace):
        self.name, self.deed, self.at, self.trace = name, deed, at, trace
        self.stages_noted = stages

    def note(self, stage, runner):
        if stage in self.stages_noted:
            self.trace.append((self.name, stage, runner.iter, runner.inner_iter, runner.epoch, runner.mode))

    def act(self, stage, runner):
        self.note(stage, runner)
        if stage != "after_train_iter" or runner.iter not in self.at:
            return
        if self.deed == "scales the loss" and "loss" in runner.outputs:
            runner.outputs["loss"] = runner.outputs["loss"] * 1.5
        elif self.deed == "writes the lr":
            runner.optimizer.param_groups[0]["lr"] = 0.03
        elif self.deed == "moves a weight":
            with torch.no_grad():
                runner.model.layer.weight.add_(0.01)
        elif self.deed == "logs":
            runner.log_buffer.update({"mine": float(runner.iter)})
        elif self.deed == "registers another" and len(runner.hooks) < 9:
            runner.register_hook(Trace(f"{self.name}+", {"before_train_iter"}, "nothing", (), self.trace), "LOW")
        elif self.deed == "removes itself":
            runner._hooks.remove(self)


def stage_method(stage):
    return lambda self, runner: self.act(stage, runner)


class TraceAll(Trace):
    """Acts at every stage."""


class TraceDue(Trace):
    """Says at which iterations it acts; its stages of a train iteration are noted at no others."""

    def due(self, runner):
        return next((i for i in self.at if i >= runner.iter), 1 << 40)

    def note(self, stage, runner):
        if "train_iter" not in stage or runner.iter in self.at:
            super().note(stage, runner)


for _kind in (TraceAll, TraceDue):
    for _stage in Hook.stages:
        setattr(_kind, _stage, stage_method(_stage))


SPECS = st.lists(
    st.tuples(
        st.sampled_from([TraceAll, TraceDue, EMAHook]),
        st.sets(st.sampled_from(Hook.stages), max_size=4),
        st.sampled_from(DEEDS),
        st.sets(st.integers(0, ITERS - 1), max_size=3),
        st.sampled_from([5, 20, 30, 40, 45, 50, 60, 70, 80, 90]),
    ),
    max_size=3,
)


def run(kind, plan, specs, workflow, clip, policy, every):
    trace: list = []
    torch.manual_seed(0)
    model = TinyModel()
    length = dict(max_iters=ITERS) if kind is IterBasedRunner else dict(max_epochs=4)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    runner = kind(model, optimizer=optimizer, work_dir=tempfile.mkdtemp(dir="."), **length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRUNNER_PLAN", plan)
        runner.register_training_hooks(
            {"by_epoch": False, **policy},
            dict(grad_clip=clip),
            dict(interval=every, by_epoch=False),
            dict(interval=every, hooks=[dict(type="TextLoggerHook", by_epoch=False)]),
        )
        for number, (hook, stages, deed, at, priority) in enumerate(specs):
            if hook is EMAHook:
                if number == 0:  # one average: a second would take the buffers of the first
                    runner.register_hook(EMAHook(momentum=0.2, interval=1 + len(at)), priority)
            else:
                runner.register_hook(hook(f"H{number}", stages, deed, tuple(sorted(at)), trace), priority)
        runner.run([batches()] * len(workflow), workflow)
    histories = {key: values for key, values in runner.log_buffer.val_history.items() if "time" not in key}
    state = [slot["momentum_buffer"].tolist() for slot in runner.optimizer.state_dict()["state"].values()]
    weights = {name: value.tolist() for name, value in runner.model.state_dict().items()}
    grads = [p.grad.tolist() for p in runner.model.parameters()]
    lr = runner.optimizer.param_groups[0]["lr"]
    return trace, weights, grads, state, lr, histories, (runner.iter, runner.epoch, runner.inner_iter)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([IterBasedRunner, EpochBasedRunner]),
    SPECS,
    st.sampled_from([[("train", 1)], [("train", 2), ("val", 1)]]),
    st.sampled_from([None, dict(max_norm=0.3), dict(max_norm=0.3, norm_type=1)]),
    st.sampled_from([dict(policy="step", step=[4, 7]), dict(policy="poly", warmup="linear", warmup_iters=3)]),
    st.integers(1, 6),
)
def test_planned_runs_are_plain_runs(kind, specs, workflow, clip, policy, every):
    planned, plain = (run(kind, plan, specs, workflow, clip, policy, every) for plan in ("on", "off"))
    assert planned == plain
