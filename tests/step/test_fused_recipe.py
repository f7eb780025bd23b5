"""torch's own optimizers, run by the core's pass: torch's results and state; torch's step where somebody watches."""

from __future__ import annotations

import copy

import pytest
import torch
from runner.helpers import batches
from torch import nn

from fastrunner import EMAHook, IterBasedRunner
from fastrunner.step.fused import FusedPass, updater

MAKERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "plain SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3))
        self.unused = nn.Parameter(torch.ones(3))

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = self.body(batch).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch))


def train(make, recipe, clip=None, ema=False, prepare=None, iters=9):
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=iters, step=recipe)
    runner.register_training_hooks(dict(policy="step", step=[4], by_epoch=False), dict(grad_clip=clip))
    if ema:
        runner.register_hook(EMAHook(momentum=0.1), priority=49)
    if prepare is not None:
        prepare(runner)
    runner.run([batches(3)], [("train", 1)])
    state = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return runner, dict(model.named_parameters()) | dict(model.named_buffers()), copy.deepcopy(state)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("clip", [None, dict(max_norm=0.05)])
@pytest.mark.parametrize("ema", [False, True])
def test_results_and_state_are_torchs(name, clip, ema):
    runner, weights, state = train(MAKERS[name], "fused", clip, ema)
    assert isinstance(runner.step.updater, FusedPass)
    _, wanted, wanted_state = train(MAKERS[name], "eager", clip, ema)
    # Unclipped SGD is torch's operations in torch's order. A norm differs in its last bit, and so do all after it;
    # Adam's roots and quotients may be rounded otherwise, and its update forgets the gradient's size.
    tolerance = dict(rtol=0, atol=0) if "SGD" in name and clip is None and not ema else dict(rtol=2e-5, atol=1e-6)
    for key in wanted:
        torch.testing.assert_close(weights[key], wanted[key], **tolerance)
        torch.testing.assert_close(state.get(key), wanted_state.get(key), **tolerance)
    assert weights["unused"].tolist() == [1, 1, 1]  # no gradient: not even decayed
    assert not state["unused"]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: type("Mine", (torch.optim.SGD,), {})(params, lr=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, foreach=True),
        lambda params: torch.optim.SGD(params, lr=0.1, differentiable=True),
        lambda params: torch.optim.Adam(params, lr=0.1, capturable=True),
        lambda params: torch.optim.RMSprop(params, lr=0.1),
    ],
)
def test_other_optimizers_stay_torchs(make):
    optimizer = make(Net().parameters())
    assert updater(optimizer) is optimizer


def test_other_dtypes_stay_torchs():
    optimizer = torch.optim.SGD(Net().double().parameters(), lr=0.1)
    assert updater(optimizer) is optimizer


@pytest.mark.parametrize("clip", [None, dict(max_norm=0.05)])
@pytest.mark.parametrize("when", ["before the run", "in the run"])
def test_a_step_that_is_watched_is_torchs(clip, when):
    """Step hooks see every step, replaced steps are called: from the moment that they are there."""
    calls = []

    def watch(runner):
        runner.optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
        step = runner.optimizer.step
        runner.optimizer.step = lambda: (calls.append("step"), step())

    runner, _, _ = train(MAKERS["SGD"], "fused", clip, prepare=watch if when == "before the run" else None, iters=4)
    if when == "in the run":
        watch(runner)
        runner._max_iters = 8
        runner.run([batches(3)], [("train", 1)])
    assert calls == ["step", "hook"] * 4


def test_a_scheduler_finds_what_torch_leaves():
    """lr is read from param_groups in each step; a state_dict travels to a fresh torch optimizer."""
    runner, weights, _ = train(MAKERS["AdamW"], "fused")
    other = Net()
    other.load_state_dict(runner.model.state_dict())
    fresh = MAKERS["AdamW"](other.parameters())
    fresh.load_state_dict(copy.deepcopy(runner.optimizer.state_dict()))
    for optimizer, model in ((runner.optimizer, runner.model), (fresh, other)):
        optimizer.zero_grad()
        model.train_step(batches(1)[0])["loss"].backward()
        optimizer.step()
    for ours, theirs in zip(weights.values(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
