"""OptimizerHook: folded clipping is what unfolded clipping is, and what may not be folded is not."""

from __future__ import annotations

import logging
from unittest.mock import Mock

import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn

from fastrunner import ClosureHook, FusedSGD, Hook, IterBasedRunner, OptimizerHook


def train(optimizer_class=FusedSGD, hook=None, iters=8, model=None, params=None, **options):
    torch.manual_seed(3)
    model = model or TinyModel()
    model.layer.weight.data.mul_(5)  # gradients above and below the bound
    optimizer = optimizer_class(params(model) if params else model.parameters(), lr=0.05, momentum=0.9, **options)
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=iters)
    runner.register_optimizer_hook(hook or OptimizerHook(dict(max_norm=1.0)))
    seen = []
    runner.register_hook(
        ClosureHook("after_iter", lambda r: seen.append([p.grad.clone() for p in r.model.parameters()])), "LOW"
    )
    runner.run([batches()], [("train", 1)])
    return runner, seen


def test_folded_equals_torch_and_leaves_clipped_gradients_readable():
    mine, my_grads = train(FusedSGD, iters=40)
    theirs, their_grads = train(torch.optim.SGD, iters=40)
    # torch's norm is float32, ours double: the coefficients differ by an ulp or two, and the weights over 40 steps
    for p, q in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
    for mine_i, theirs_i in zip(my_grads, their_grads, strict=True):
        for g, h in zip(mine_i, theirs_i, strict=True):
            torch.testing.assert_close(g, h, rtol=2e-5, atol=1e-6)
    ours, torchs = (r.log_buffer.val_history["grad_norm"] for r in (mine, theirs))
    assert max(ours) > 1 > min(ours)
    assert ours == pytest.approx(torchs, rel=2e-5)


def spy(monkeypatch) -> Mock:
    """Counts folded steps."""
    folded, step = Mock(), FusedSGD.step

    def counting(self, *args, **kwargs):
        if kwargs.get("max_norm") is not None:
            folded()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FusedSGD, "step", counting)
    return folded


def test_the_plain_case_is_folded(monkeypatch):
    folded = spy(monkeypatch)
    train()
    assert folded.call_count == 8


class OwnClip(OptimizerHook):
    def clip_grads(self, params):
        return super().clip_grads(params)


class Subclass(FusedSGD):
    pass


def shadowed() -> OptimizerHook:
    hook = OptimizerHook(dict(max_norm=1.0))
    hook.clip_grads = lambda params: None
    return hook


@pytest.mark.parametrize(
    "case",
    [
        dict(hook=OwnClip(dict(max_norm=1.0))),
        dict(hook=shadowed()),
        dict(hook=OptimizerHook(dict(max_norm=1.0, norm_type=1))),
        dict(hook=OptimizerHook(dict(max_norm=1.0, error_if_nonfinite=True))),
        dict(optimizer_class=Subclass),
        dict(params=lambda model: [model.layer.weight]),  # MMCV's norm is over the model, not over the optimizer
    ],
    ids=["subclass_of_hook", "shadowed_method", "norm_type", "other_argument", "subclass_of_optimizer", "other_params"],
)
def test_what_a_user_could_notice_is_not_folded(case, monkeypatch):
    folded = spy(monkeypatch)
    train(**case)
    assert folded.call_count == 0


def test_parameters_without_gradients_are_left_alone_and_no_norm_is_logged_without_any():
    model = TinyModel()
    model.register_parameter("unused", nn.Parameter(torch.ones(1)))
    torch.manual_seed(3)
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1, weight_decay=0.1), max_iters=2)
    runner.register_optimizer_hook(dict(grad_clip=dict(max_norm=1.0)))
    runner.run([batches()], [("train", 1)])
    assert model.unused.item() == 1.0  # not decayed either, as in torch


def test_gradients_are_zeroed_before_backward_not_after():
    alive = []

    class Look(Hook):
        def before_train_iter(self, runner):
            alive.append(runner.model.layer.weight.grad is not None)

    model = TinyModel()
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=3)
    runner.register_optimizer_hook({})
    runner.register_hook(Look())
    runner.run([batches()], [("train", 1)])
    assert alive == [False, True, True]


def test_detect_anomalous_params_names_exactly_those_outside_the_graph():
    model = TinyModel()
    model.aside = nn.Linear(1, 1, bias=False)
    model.frozen = nn.Linear(1, 1).requires_grad_(False)
    logger = Mock()
    runner = Mock(model=model, logger=logger, optimizer=FusedSGD(model.parameters(), lr=0.1))
    runner.outputs = model.train_step(batches()[0])
    OptimizerHook(detect_anomalous_params=True).after_train_iter(runner)
    ((_, said),) = logger.log.call_args_list
    assert said["level"] == logging.ERROR
    assert said["msg"].startswith("aside.weight with shape torch.Size([1, 1]) is not in the computational graph")
