"""What goes wrong in the middle of a lowered iteration is named, and leaves what MMCV's order would leave."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from runner.helpers import TinyModel, batches

from fastrunner import EpochBasedRunner, FusedSGD, HookError, IterBasedRunner
from fastrunner.hooks.lr import PolyLrUpdaterHook

KINDS = pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
PLANS = pytest.mark.parametrize("plan", ["on", "off"])


class FailsAt(TinyModel):
    """Its seventh step is different; by then the iterations are the plan's, and nobody is called in them."""

    def __init__(self, change):
        super().__init__()
        self.change, self.count = change, 0

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.count += 1
        outputs = super().train_step(data_batch, optimizer, **kwargs)
        return self.change(outputs) if self.count == 7 else outputs


def make(kind, change, clip=1.0, policy=None):
    torch.manual_seed(0)
    model = FailsAt(change)
    length = dict(max_iters=12) if kind is IterBasedRunner else dict(max_epochs=1)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    runner = kind(model, optimizer=optimizer, logger=logging.Logger("quiet", logging.CRITICAL), **length)
    grad_clip = None if clip is None else dict(max_norm=clip)
    runner.register_training_hooks(
        policy or dict(policy="fixed", by_epoch=False), dict(grad_clip=grad_clip), None, None
    )
    return runner


def fail(error):
    def change(outputs):
        raise error

    return change


def without_graph(outputs):
    return {**outputs, "loss": outputs["loss"].detach()}


def broken_backward(outputs):
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError("in backward")

    return {**outputs, "loss": Breaks.apply(outputs["loss"])}


def run(runner, monkeypatch, plan):
    monkeypatch.setenv("FASTRUNNER_PLAN", plan)
    runner.run([batches(12)], [("train", 1)])


@PLANS
@KINDS
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (without_graph, ValueError, r"OptimizerHook\.after_train_iter raised ValueError: the loss does not depend on"),
        (broken_backward, ZeroDivisionError, r"OptimizerHook\.after_train_iter raised ZeroDivisionError: in backward"),
        (
            lambda outputs: {**outputs, "loss": None},
            TypeError,
            r"OptimizerHook\..*the loss is a NoneType, not a tensor",
        ),
        (
            lambda outputs: {k: outputs[k] for k in ("log_vars", "num_samples")},
            KeyError,
            "train_step returned no 'loss'",
        ),
    ],
    ids=["no graph", "backward", "no tensor", "no loss"],
)
def test_the_update_is_named(kind, plan, change, error, says, monkeypatch):
    runner = make(kind, change)
    with pytest.raises(error, match=says) as info:
        run(runner, monkeypatch, plan)
    assert isinstance(info.value, HookError)
    assert (info.value.hook, info.value.stage) == ("OptimizerHook", "after_train_iter")
    assert runner.iter == 6
    # log_vars of the failed iteration are there, as they are in MMCV; its time is not
    lengths = {key: len(values) for key, values in runner.log_buffer.val_history.items()}
    assert lengths == {"data_time": 7, "loss": 7, "grad_norm": 6, "time": 6}


@PLANS
@KINDS
@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("num_samples"), KeyboardInterrupt()], ids=repr)
def test_the_model_s_own_error_arrives_as_it_is(kind, plan, error, monkeypatch):
    runner = make(kind, fail(error))
    with pytest.raises(type(error)) as info:
        run(runner, monkeypatch, plan)
    assert info.value is error
    assert runner.iter == 6
    assert len(runner.log_buffer.val_history["loss"]) == 6


@PLANS
@KINDS
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda outputs: 7, TypeError, "must return a dict, got int"),
        (lambda outputs: {k: outputs[k] for k in ("loss", "log_vars")}, KeyError, "also need num_samples"),
    ],
    ids=["no dict", "no num_samples"],
)
def test_outputs_of_another_kind_are_named(kind, plan, change, error, says, monkeypatch):
    with pytest.raises(error, match=says):
        run(make(kind, change), monkeypatch, plan)


@PLANS
@KINDS
@pytest.mark.parametrize(
    ("log_vars", "error", "says"),
    [
        ([1], TypeError, "log_vars must be a dict of name -> value, got list"),
        ({"x": torch.ones(2)}, ValueError, r"log_vars\['x'\] has shape \(2,\)"),
    ],
)
def test_log_vars_of_another_kind_are_named_when_they_are_averaged_at_the_latest(
    kind, plan, log_vars, error, says, monkeypatch
):
    runner = make(kind, lambda outputs: {**outputs, "log_vars": log_vars})

    def run_and_look():
        run(runner, monkeypatch, plan)
        runner.log_buffer.average()

    with pytest.raises(error, match=says):
        run_and_look()


@KINDS
def test_a_policy_that_raises_is_named(kind, monkeypatch):
    get_lr = PolyLrUpdaterHook.get_lr

    def fails(self, runner, base_lr):
        if runner.iter == 6:
            raise OverflowError("too far")
        return get_lr(self, runner, base_lr)

    monkeypatch.setattr(PolyLrUpdaterHook, "get_lr", fails)
    runner = make(kind, None, policy=dict(policy="poly", by_epoch=False))
    runner.model.change = lambda outputs: outputs
    with pytest.raises(OverflowError, match=r"PolyLrUpdaterHook\.before_train_iter raised OverflowError: too far"):
        run(runner, monkeypatch, "on")


@KINDS
@pytest.mark.parametrize("clip", [None, 1.0])
def test_keys_that_come_and_go_are_averaged_each_over_its_own(kind, clip, monkeypatch):
    histories = []
    for plan in ("on", "off"):
        runner = make(kind, lambda outputs: {**outputs, "log_vars": {"extra": 3.0, **outputs["log_vars"]}}, clip)
        run(runner, monkeypatch, plan)
        runner.log_buffer.average()
        histories.append({k: v for k, v in runner.log_buffer.val_history.items() if "time" not in k})
        assert runner.log_buffer.output["extra"] == 3.0
    assert histories[0] == histories[1]
    assert len(histories[0]["loss"]) == 12
    assert histories[0]["extra"] == [3.0]


@KINDS
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_nan_goes_on_as_in_mmcv(kind, clip, monkeypatch):
    """It spreads into weights and norm, is logged, and nothing hides it; CheckInvalidLoss-like hooks decide."""
    runner = make(kind, lambda outputs: {**outputs, "loss": outputs["loss"] * math.nan}, clip)
    run(runner, monkeypatch, "on")
    assert runner.iter == 12
    assert all(p.isnan().all() for p in runner.model.parameters())
    assert all(map(math.isnan, runner.log_buffer.val_history["loss"][7:]))
    if clip:
        norms = runner.log_buffer.val_history["grad_norm"]
        assert [math.isnan(norm) for norm in norms] == [False] * 6 + [True] * 6


@KINDS
def test_a_step_that_logs_nothing(kind, monkeypatch):
    for plan in ("on", "off"):
        runner = make(kind, lambda outputs: {"loss": outputs["loss"]}, clip=None)
        run(runner, monkeypatch, plan)
        assert len(runner.log_buffer.val_history["loss"]) == 11
        assert len(runner.log_buffer.val_history["time"]) == 12
