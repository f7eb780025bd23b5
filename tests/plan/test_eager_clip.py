"""Clipping by MMCV's own order: over the model's parameters, without a walk over its modules in each iteration."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from fastrunner import ClosureHook, IterBasedRunner, supervised


def parts(turned: bool):
    torch.manual_seed(0)
    model = supervised(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss())
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params[::-1] if turned else params, lr=0.5, momentum=0.9)
    batches = [{"img": torch.randn(4, 6), "gt_label": torch.tensor([0, 1, 2, 0])} for _ in range(8)]
    return model, optimizer, batches


@pytest.mark.parametrize("turned", [False, True])
def test_weights_are_those_of_the_loop_by_hand(turned):
    """To the bit: the norm is summed in the model's order, also where the optimizer has another one."""
    model, optimizer, batches = parts(turned)
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=8, logger=logging.Logger("quiet"), step="eager")
    runner.register_training_hooks({"policy": "fixed"}, {"grad_clip": {"max_norm": 0.1}}, None, None)
    walks, parameters = [], model.parameters
    model.parameters = lambda: walks.append(1) or parameters()
    runner.run([batches], [("train", 1)])
    # train_step asks for the first one in each iteration; clipping walks again where it has to, planning now and then
    assert (len(walks) < 16) == (not turned)
    del model.parameters
    by_hand, optimizer, batches = parts(turned)
    for batch in batches:
        loss = by_hand.train_step(batch, optimizer)["loss"]
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
    for ours, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_another_model_in_the_middle_of_a_run():
    """What a hook puts in its place is what is clipped."""
    seen = []
    model, optimizer, batches = parts(False)
    other = parts(False)[0]
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=4, logger=logging.Logger("quiet"), step="eager")
    runner.register_training_hooks({"policy": "fixed"}, {"grad_clip": {"max_norm": 0.1}}, None, None)
    hook = next(hook for hook in runner.hooks if hasattr(hook, "clip_grads"))
    clip = hook.clip_grads

    def watched(params):
        params = list(params)
        seen.append(params[0] is next(iter(other.parameters())))
        return clip(params)

    hook.clip_grads = watched

    def swap(runner):
        if runner.iter == 1:
            runner.model = other

    runner.register_hook(ClosureHook("before_train_iter", swap))
    runner.run([batches], [("train", 1)])
    assert seen == [False, True, True, True]
