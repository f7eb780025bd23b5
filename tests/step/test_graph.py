"""The graph recipe in a run: what it refuses, with the user's line; what makes it look again; what it leaves."""

from __future__ import annotations

import copy
import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from step.runs import graph_of, interpret, make, state_of, train
from step.zoo import ZOO, Model, vectors
from torch import nn
from torch.nn import functional as F

from fastrunner import EpochBasedRunner, FusedAdamW, Hook, IterBasedRunner
from fastrunner.step import batches
from fastrunner.step import graph as graph_module
from fastrunner.step.binding import Binding

MLP = ZOO["mlp"]


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch):
    if "inductor_cache" not in request.fixturenames:
        interpret(monkeypatch)


class Steps(nn.Module):
    """A linear classifier whose train_step is ``body(model, batch) -> loss``."""

    def __init__(self, body):
        super().__init__()
        self.layer, self.body = nn.Linear(16, 10), body
        self.register_buffer("mean", torch.zeros(10))
        self.count = 0

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = self.body(self, batch)
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch["y"]))


def plain(model, batch):
    return F.cross_entropy(model.layer(batch["x"]), batch["y"])


def draws_in_python(model, batch):
    return plain(model, batch) * (0.5 + random.random())


def draws_in_numpy(model, batch):
    return plain(model, batch) * (0.5 + np.random.rand())


def counts(model, batch):
    model.count += 1
    return plain(model, batch) * (1 + 0.1 * model.count)


def reassigns(model, batch):
    z = model.layer(batch["x"])
    model.mean = 0.9 * model.mean + 0.1 * z.detach().mean(0)
    return F.cross_entropy(z - model.mean, batch["y"])


def branches(model, batch):
    loss = plain(model, batch)
    return loss * 2 if loss > 2 else loss  # LINE branches


def reads(model, batch):
    loss = plain(model, batch)
    return loss * (1 + loss.item())  # LINE reads


def hooks_a_tensor(model, batch):
    z = model.layer(batch["x"])
    z.register_hook(lambda grad: grad * 2)  # LINE hooks_a_tensor
    return F.cross_entropy(z, batch["y"])


def keeps_a_tensor(model, batch):
    if not hasattr(model, "kept"):
        model.kept = torch.zeros(10)
    return F.cross_entropy(model.layer(batch["x"]) + model.kept, batch["y"])


def line_of(body):
    lines = Path(__file__).read_text().splitlines()
    return next((f"test_graph.py:{i}" for i, line in enumerate(lines, 1) if f"# LINE {body.__name__}" in line), "")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (draws_in_python, "python's random"),
        (draws_in_numpy, "numpy.random"),
        (counts, "Steps.count"),
        (reassigns, "another tensor into mean"),
        (branches, ""),
        (reads, "reads a value on the host"),
        (hooks_a_tensor, "a tensor hook"),
        (keeps_a_tensor, "Steps.kept"),
    ],
)
def test_what_a_graph_would_get_wrong_is_refused_and_the_run_goes_on(body, says, caplog):
    family = replace(MLP, model=lambda: Steps(body), clip=None)
    random.seed(1)
    np.random.seed(1)
    runner, losses = train(family, "graph")
    assert graph_of(runner).num_calls == 0
    (why,) = [line for line in graph_of(runner).explain() if line.startswith("no graph")]
    assert says in why
    assert line_of(body) in why
    assert len([r for r in caplog.records if "no graph of the step" in r.getMessage()]) == 1
    random.seed(1)
    np.random.seed(1)
    assert losses == train(family, "fused")[1]


def test_metas_in_the_batch_are_guards_by_value():
    """A number that the step computes with: one graph a value; a batch that cannot be compared: none."""

    class Scaled(Steps):
        def train_step(self, batch, optimizer=None, **kwargs):
            loss = plain(self, batch) * batch["metas"][0]["scale"]
            return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=8)

    def batch(number):
        return dict(vectors(number), metas=[dict(scale=1.0 + number % 2, shape=(3, 4), name="a")])

    family = replace(MLP, model=lambda: Scaled(plain), batch=batch)
    runner, losses = train(family, "graph", 16)
    assert losses == pytest.approx(train(family, "eager", 16)[1], rel=1e-5)
    assert len(graph_of(runner)._graphs) == 2
    assert graph_of(runner).num_calls > 8


def test_a_second_shape_gets_its_graph_and_a_tail_batch_does_not():
    odd = [vectors(0), vectors(1), vectors(2, size=5)]
    runner, losses = train(MLP, "graph", 7, batches=odd)  # the odd one comes twice
    assert [len(graph_of(runner)._graphs), graph_of(runner).num_calls] == [1, 3]
    assert losses == pytest.approx(train(MLP, "eager", 7, batches=odd)[1], rel=1e-5)
    runner, losses = train(MLP, "graph", 12, batches=odd)  # it recurs
    assert len(graph_of(runner)._graphs) == 2
    assert losses == pytest.approx(train(MLP, "eager", 12, batches=odd)[1], rel=1e-5)


def test_graphs_and_compiles_are_bounded(monkeypatch, caplog):
    monkeypatch.setattr(graph_module, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graph_module, "MAX_COMPILES", 5)
    sizes = [vectors(i, size=4 + i) for i in range(4)]
    runner, losses = train(MLP, "graph", 30, batches=sizes)
    assert len(graph_of(runner)._graphs) <= 2
    assert graph_of(runner).num_compiles <= 5
    assert losses == pytest.approx(train(MLP, "eager", 30, batches=sizes)[1], rel=1e-5)


def test_a_model_that_changes_shape_every_batch_trains_below():
    sizes = [vectors(i, size=4 + i) for i in range(9)]
    runner, losses = train(MLP, "graph", 9, batches=sizes)
    assert graph_of(runner).num_compiles == 0
    assert losses == train(MLP, "fused", 9, batches=sizes)[1]


def test_file_names_in_the_batch_end_the_search_for_graphs(monkeypatch):
    monkeypatch.setattr(batches, "MAX_SHAPES", 5)
    named = [dict(vectors(i), name=f"{i}.jpg") for i in range(9)]
    runner, losses = train(MLP, "graph", 9, batches=named)
    assert any("5 kinds of batches" in line for line in graph_of(runner).explain())
    assert losses == train(MLP, "fused", 9, batches=named)[1]


def test_an_lr_that_changes_in_each_iteration_is_read_in_each_without_another_look(monkeypatch):
    def run(recipe):
        torch.manual_seed(0)
        model = MLP.model()
        optimizer = MLP.optimizer(model.parameters())
        runner = IterBasedRunner(model, optimizer=optimizer, max_iters=20, step=recipe)
        policy = dict(policy="CosineAnnealing", min_lr=0, by_epoch=False)
        runner.register_training_hooks(policy, {})
        runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
        return runner

    looks = []
    holds = Binding.holds
    monkeypatch.setattr(Binding, "holds", lambda self: looks.append(1) or holds(self))
    graphed = run("graph")
    assert graph_of(graphed).num_calls == 18
    assert len(looks) <= 3
    for key, value in state_of(run("eager")).items():
        torch.testing.assert_close(state_of(graphed)[key], value, rtol=1e-4, atol=1e-6)


class Acts(Hook):
    """Does something once, at iteration ``at``, and says so beforehand: other iterations may be graphs."""

    def __init__(self, act, at=4, stage="after_train_iter"):
        self.act, self.at = act, at
        self._stage = stage

    def due(self, runner):
        return self.at if runner.iter <= self.at else 1 << 40

    def before_train_iter(self, runner):
        if self._stage == "before_train_iter" and runner.iter == self.at:
            self.act(runner)

    def after_train_iter(self, runner):
        if self._stage == "after_train_iter" and runner.iter == self.at:
            self.act(runner)


def freeze(runner):
    runner.model.body[0].weight.requires_grad_(False)


def replace_weight(runner):
    old = runner.model.body[3].weight
    runner.model.body[3].weight.data = old.detach().clone() * 0.5


def evaluate(runner):
    runner.model.body[2].eval()


def load_state(runner):
    runner.optimizer.load_state_dict(copy.deepcopy(runner.optimizer.state_dict()))


def write_lr(runner):
    runner.optimizer.param_groups[0]["lr"] *= 3


def write_weight_decay(runner):
    runner.optimizer.param_groups[0]["weight_decay"] = 0.3


def drop_p(runner):
    for parameter in runner.model.parameters():
        parameter.data.mul_(0.9)


@pytest.mark.parametrize("stage", ["before_train_iter", "after_train_iter"])
@pytest.mark.parametrize("act", [freeze, replace_weight, evaluate, load_state, write_lr, write_weight_decay, drop_p])
def test_what_a_hook_changes_counts_from_the_next_step_on(act, stage):
    def run(recipe):
        return train(MLP, recipe, 12, hooks=[Acts(act, stage=stage)])

    runner, losses = run("graph")
    assert graph_of(runner).num_calls >= 5
    assert losses == pytest.approx(run("eager")[1], rel=1e-5)


def test_a_hook_that_is_called_finds_clipped_gradients_and_a_loss_with_a_graph():
    seen = []

    def look(runner):
        seen.append([p.grad.clone() for p in runner.model.parameters()])
        assert runner.outputs["loss"].requires_grad

    runner, _ = train(MLP, "graph", 8, hooks=[Acts(look)])
    assert graph_of(runner).num_calls >= 4
    train(MLP, "eager", 8, hooks=[Acts(look)])
    for ours, eager in zip(*seen, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def test_a_hook_that_is_always_called_leaves_no_iteration_to_graphs():
    class Always(Hook):
        def after_train_iter(self, runner):
            assert all(p.grad is not None for p in runner.model.parameters())

    runner, _ = train(MLP, "graph", hooks=[Always()])
    assert graph_of(runner).num_calls == 0


@pytest.mark.parametrize("seen", [False, True])
def test_gradients_are_there_at_the_end_of_a_run_and_of_an_epoch_that_is_seen(seen):
    ends = []

    class End(Hook):
        def after_train_epoch(self, runner):
            ends.append(all(p.grad is not None for p in runner.model.parameters()))

    torch.manual_seed(0)
    model = MLP.model()
    runner = EpochBasedRunner(model, optimizer=MLP.optimizer(model.parameters()), max_epochs=3, step="graph")
    runner.register_training_hooks(dict(policy="fixed"), {})
    if seen:
        runner.register_hook(End())
    runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
    assert all(p.grad is not None for p in model.parameters())
    assert ends == [True] * (3 if seen else 0)
    assert graph_of(runner).num_calls >= 6


def test_the_log_is_eagers(tmp_path):
    def logged(recipe):
        import json

        runner, _ = make(MLP, recipe, 20, log_interval=4)
        runner.work_dir = str(tmp_path / recipe)
        runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
        if recipe == "graph":
            assert graph_of(runner).num_calls >= 17  # an iteration after which only loggers act is one call too
        (path,) = Path(runner.work_dir).glob("*.log.json")
        return [json.loads(line) for line in path.read_text().splitlines() if "loss" in line]

    ours, eager = logged("graph"), logged("eager")
    assert len(ours) == len(eager) == 5
    for mine, theirs in zip(ours, eager, strict=True):
        assert list(mine) == list(theirs)  # the same keys in the same order
        for key in ("loss", "acc", "grad_norm", "lr", "iter"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


@pytest.mark.parametrize("optimizer", [FusedAdamW, torch.optim.AdamW])
def test_recipes_can_take_turns(optimizer):
    """Graph, fused and eager steps share weights and state, step counters included."""
    family = replace(MLP, optimizer=lambda params: optimizer(params, lr=1e-2))
    looks = [Acts(lambda runner: None, at) for at in (3, 5, 8)]
    runner, losses = train(family, "graph", 12, hooks=looks)
    assert 5 <= graph_of(runner).num_calls <= 8
    eager, wanted = train(family, "eager", 12)
    assert losses == pytest.approx(wanted, rel=1e-5)
    steps = {key: value for key, value in state_of(eager).items() if key.endswith(" step")}
    assert steps
    for key, value in steps.items():
        assert torch.equal(state_of(runner)[key], value)


def test_a_watch_for_host_reads_costs_no_graph_and_counts_the_steps_own_only():
    lifts = replace(ZOO["mlp"], model=lambda: Model(nn.Sequential(nn.Linear(16, 10)), lifts=True))
    runner, _ = make(lifts, "graph", 14)
    assert "next 10 iterations will be watched" in runner.explain()
    runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
    assert graph_of(runner).num_calls == 12
    (line,) = runner.host_reads.report()  # the first iteration reads, graphs do not
    assert "zoo.py" in line
    assert "0.1 an iteration" in line


def test_a_stale_autograd_graph_fails_as_in_torch():
    kept = []
    runner, _ = make(MLP, "graph", 8, hooks=[Acts(lambda r: kept.append(r.model.body(vectors(9)["x"]).sum()), 3)])
    runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
    assert graph_of(runner).num_calls > 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].backward()


def test_a_second_run_uses_the_graphs_of_the_first():
    runner, _ = make(MLP, "graph", 6)
    runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
    compiles, calls = graph_of(runner).num_compiles, graph_of(runner).num_calls
    runner._max_iters = 12
    runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
    assert graph_of(runner).num_compiles == compiles
    assert graph_of(runner).num_calls >= calls + 4


def crash(*args):
    raise RuntimeError("g++ is not installed")


def wrong(module, args):
    return (lambda inputs: [value * 1.1 for value in module(*inputs)]), True


@pytest.mark.parametrize(("compiler", "says"), [(crash, "g++ is not installed"), (wrong, "the loss differs")])
def test_a_compiler_that_fails_or_errs_is_one_warning(compiler, says, monkeypatch, caplog):
    monkeypatch.setattr(graph_module, "compile_graph", compiler)
    runner, losses = train(MLP, "graph", 10)
    assert losses == train(MLP, "fused", 10)[1]
    assert [says in r.getMessage() for r in caplog.records if "no graph of the step" in r.getMessage()] == [True]
    assert graph_of(runner).num_compiles == 1


def test_a_torch_without_what_is_needed_trains_below(monkeypatch):
    from fastrunner.step import torch_private

    monkeypatch.setattr(torch_private, "NEEDED", (*torch_private.NEEDED, ("torch._inductor.compile_fx", "gone")))
    runner, losses = train(MLP, "graph")
    assert losses == train(MLP, "fused")[1]
    assert any("has no torch._inductor.compile_fx.gone" in line for line in graph_of(runner).explain())


@pytest.mark.timeout(300)
def test_a_compiled_graph_is_called_by_its_inner_callable(inductor_cache):
    """The whole way, inductor included; every other family is compiled by the slow tests of test_zoo.py."""
    family = replace(MLP, model=lambda: Model(nn.Sequential(nn.Linear(16, 10), nn.Dropout(0.3))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner, losses = train(family, "graph", 20, ema=1)
    assert graph_of(runner).num_calls == 18
    assert losses == pytest.approx(train(family, "eager", 20, ema=1)[1], rel=1e-5)
    (compiled,) = graph_of(runner)._graphs.values()
    assert compiled.run.__qualname__ != "compile_graph.<locals>.<lambda>"
