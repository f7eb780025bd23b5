"""A run that goes on from a checkpoint under recipe graph has the bits of the run that was never interrupted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from step.runs import LossHook, graph_of, interpret, state_of
from step.zoo import ZOO, Model, vectors
from torch import nn

from fastrunner import EMAHook, EpochBasedRunner, Hook, IterBasedRunner

MLP = ZOO["mlp"]  # AdamW, a dropout, clipping


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch):
    if "inductor_cache" not in request.fixturenames:
        interpret(monkeypatch)


class Stop(Hook):
    """Stops at an iteration, and says so beforehand."""

    def __init__(self, at):
        self.at = at

    def due(self, runner):
        return self.at if runner.iter <= self.at else 1 << 40

    def after_train_iter(self, runner):
        if runner.iter == self.at:
            runner.stop("seen enough")


def make(family, kind, folder, seed, stop=None):
    torch.manual_seed(0)
    model = family.model()
    length = dict(max_epochs=3) if kind is EpochBasedRunner else dict(max_iters=15)
    optimizer = family.optimizer(model.parameters())
    runner = kind(model, optimizer=optimizer, work_dir=str(folder), step="graph", **length)
    runner.register_training_hooks(
        dict(policy="CosineAnnealing", min_lr=0, by_epoch=False),
        dict(grad_clip=dict(max_norm=0.5)),
        dict(interval=1, by_epoch=False),
    )
    runner.register_hook(EMAHook(momentum=0.1, interval=2), priority=49)
    losses = LossHook()
    runner.register_hook(losses)
    if stop is not None:
        runner.register_hook(Stop(stop))
    torch.manual_seed(seed)
    return runner, losses


def run(family, kind, folder, batches, seed=3, resume=None, stop=None):
    runner, losses = make(family, kind, folder, seed, stop)
    if resume is not None:
        runner.resume(str(resume))
    runner.run([batches], [("train", 1)])
    return runner, losses.losses


def assert_equal(ours, theirs):
    ours, theirs = state_of(ours), state_of(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


SAME = [vectors(i) for i in range(5)]
ODD = [vectors(0), vectors(1, size=5), vectors(2), vectors(3), vectors(4, size=5)]  # two shapes, two graphs


@pytest.mark.parametrize(
    ("kind", "batches", "places"), [(IterBasedRunner, ODD, (1, 7)), (EpochBasedRunner, SAME, (2, 12))]
)
def test_each_checkpoint_goes_on_to_the_bit(kind, batches, places, tmp_path):
    whole, losses = run(MLP, kind, tmp_path, batches)
    assert graph_of(whole).num_calls >= 8
    for at in places:
        resumed, rest = run(MLP, kind, tmp_path / "again", batches, seed=99, resume=tmp_path / f"iter_{at}.pth")
        assert_equal(resumed, whole)
        assert rest == losses[len(losses) - len(rest) :]
        if at > 2:  # the first iteration is one call already
            assert graph_of(resumed).num_calls >= graph_of(whole).num_calls - at


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    at = 8
    whole, _ = run(MLP, IterBasedRunner, tmp_path, SAME, stop=at)
    whole.run([SAME], [("train", 1)])
    run(MLP, IterBasedRunner, tmp_path / "half", SAME, stop=at)
    again, _ = run(MLP, IterBasedRunner, tmp_path / "rest", SAME, 99, tmp_path / "half" / f"iter_{at + 1}.pth", at)
    assert_equal(again, whole)


class Draws(Model):
    """Has come to draw random numbers in Python since the checkpoint was written."""

    draws = False

    def train_step(self, batch, optimizer=None, **kwargs):
        outputs = super().train_step(batch)
        return dict(outputs, loss=outputs["loss"] * (0.5 + random.random())) if self.draws else outputs


def test_a_step_that_is_another_by_now_is_looked_at(tmp_path, monkeypatch):
    family = replace(MLP, model=lambda: Draws(nn.Linear(16, 10)))
    run(family, IterBasedRunner, tmp_path, SAME)
    monkeypatch.setattr(Draws, "draws", True)
    random.seed(1)
    resumed, _ = run(family, IterBasedRunner, tmp_path / "again", SAME, resume=tmp_path / "iter_8.pth")
    assert graph_of(resumed).num_calls == 0
    assert any("python's random" in line for line in graph_of(resumed).explain())


def test_a_wrong_graph_after_a_resume_is_found_at_the_second_batch(tmp_path, monkeypatch):
    """Its first batch was all that it could be verified on."""
    from fastrunner.step import graph

    run(MLP, IterBasedRunner, tmp_path, SAME)
    first = vectors(3)["x"][0, 0]  # of the batch after the checkpoint

    def wrong(module, args):
        def call(inputs):
            values = module(*inputs)
            return [value * (1 if inputs[-2][0, 0] == first else 1.1) for value in values]

        return call, True

    monkeypatch.setattr(graph, "compile_graph", wrong)
    resumed, _ = run(MLP, IterBasedRunner, tmp_path / "again", SAME, resume=tmp_path / "iter_8.pth")
    assert graph_of(resumed).num_calls == 1
    assert any("the loss differs" in line for line in graph_of(resumed).explain())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_graphs_go_on_to_the_bit(tmp_path, inductor_cache):
    whole, _ = run(MLP, IterBasedRunner, tmp_path, SAME)
    resumed, _ = run(MLP, IterBasedRunner, tmp_path / "again", SAME, seed=99, resume=tmp_path / "iter_7.pth")
    assert graph_of(resumed).num_calls >= graph_of(whole).num_calls - 7
    assert_equal(resumed, whole)
