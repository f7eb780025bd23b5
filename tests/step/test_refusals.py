"""What no graph is made of, each with its reason; the run goes on below, with the same losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed
from step.runs import graph_of, interpret, make
from step.zoo import ZOO, Model, vectors
from torch import nn
from torch.nn import functional as F

from fastrunner import FusedSGD, Hook, IterBasedRunner, MMDistributedDataParallel

MLP = ZOO["mlp"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch)


def refused(family=MLP, prepare=lambda runner: None, says=""):
    """A run under graph is a run below, and says why."""
    seen = []
    for recipe in ("graph", "fused"):
        runner, losses = make(family, recipe, 6)
        prepare(runner)
        runner.run([[family.batch(i) for i in range(4)]], [("train", 1)])
        seen.append(losses.losses)
        if recipe == "graph":
            assert graph_of(runner).num_calls == 0
            assert any(says in line for line in graph_of(runner).explain()), graph_of(runner).explain()
    assert seen[0] == seen[1]


class Sub(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(optimizer=lambda params: Sub(params)), "Sub is not exactly"),
        (dict(optimizer=lambda params: torch.optim.RMSprop(params)), "RMSprop is not exactly"),
        (dict(optimizer=lambda params: torch.optim.Adam(params, amsgrad=True)), "amsgrad=True"),
        (dict(optimizer=lambda params: FusedSGD(params, lr=0.1, clip_grad_norm=1.0)), "by itself"),
        (dict(model=lambda: Model(nn.Linear(16, 10, dtype=torch.bfloat16)), clip=None), "bfloat16"),
    ],
)
def test_optimizers_and_parameters_that_a_graph_does_not_have(change, says):
    if "bfloat16" in says:

        def cast(number):
            batch = vectors(number)
            return dict(batch, x=batch["x"].bfloat16())

        change = dict(change, batch=cast)
    refused(replace(MLP, **change), says=says)


@pytest.mark.parametrize(
    ("add", "says"),
    [
        (lambda r: r.model.body[0].register_forward_hook(lambda *_: None), "body.0 (Linear) has module hooks"),
        (lambda r: r.model.body[1].register_full_backward_hook(lambda *_: None), "body.1 (ReLU) has module hooks"),
        (lambda r: r.model.body[0].weight.register_hook(lambda grad: grad), "body.0.weight has a tensor hook"),
        (lambda r: r.model.body[0].bias.register_post_accumulate_grad_hook(lambda p: None), "has a tensor hook"),
        (lambda r: r.optimizer.register_step_post_hook(lambda *_: None), "step hooks"),
        (lambda r: setattr(r.optimizer, "step", r.optimizer.step), "step() is replaced"),
    ],
)
def test_hooks_of_modules_tensors_and_optimizers(add, says):
    refused(prepare=add, says=says)


def test_hooks_of_all_modules():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        refused(says="hooks for all modules")
    finally:
        handle.remove()


def test_parameters_without_an_optimizer_and_a_batch_norm_that_counts_on_the_host():
    loose = replace(MLP, optimizer=lambda params: torch.optim.SGD(list(params)[:2], lr=0.1), clip=None)
    refused(loose, says="body.3.weight requires a gradient but is in no optimizer")
    norm = replace(MLP, model=lambda: Model(nn.Sequential(nn.Linear(16, 10), nn.BatchNorm1d(10, momentum=None))))
    refused(norm, says="momentum=None")


class Named(torch.Tensor):
    """A subclass, as torchvision's tv_tensors are."""


class NamedParameter(nn.Parameter):
    pass


def test_tensor_subclasses():
    def batch(number):
        plain = vectors(number)
        return dict(plain, x=plain["x"].as_subclass(Named))

    refused(replace(MLP, batch=batch), says="the batch holds a Named that is a subclass")

    def model():
        made = Model(nn.Linear(16, 10))
        made.body.weight = NamedParameter(made.body.weight.detach())
        return made

    refused(replace(MLP, model=model), says="body.weight is a NamedParameter")


def test_a_batch_that_cannot_be_compared():
    refused(replace(MLP, batch=lambda i: dict(vectors(i), file=bytearray(b"x"))), says="bytearray")


def test_gradients_that_processes_exchange(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        family = replace(MLP, model=lambda: MMDistributedDataParallel(MLP.model()))
        refused(family, says="exchanges gradients in hooks")
    finally:
        torch.distributed.destroy_process_group()


def test_a_sparse_gradient_is_refused():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 10)

        def train_step(self, batch, optimizer=None):
            rows = F.embedding(batch["y"], self.layer.weight, sparse=True)
            loss = F.cross_entropy(rows @ torch.ones(16, 10), batch["y"])
            return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=8)

    def optimizer(params):
        return torch.optim.SGD(params, lr=0.1)

    refused(replace(MLP, model=Bag, clip=None, optimizer=optimizer), says="layer.weight has a sparse gradient")


class TwoOptimizers(nn.Module):
    """A GAN in small: it steps its optimizers itself, one after the other."""

    def __init__(self):
        super().__init__()
        self.maker, self.judge = nn.Linear(16, 16), nn.Linear(16, 1)

    def train_step(self, batch, optimizer=None, **kwargs):
        made = self.maker(batch["x"])
        judged = F.softplus(-self.judge(batch["x"])).mean() + F.softplus(self.judge(made.detach())).mean()
        optimizer["judge"].zero_grad()
        judged.backward()
        optimizer["judge"].step()
        fooled = F.softplus(-self.judge(made)).mean()
        optimizer["maker"].zero_grad()
        fooled.backward()
        optimizer["maker"].step()
        return dict(loss=fooled, log_vars=dict(loss=fooled.detach(), judged=judged.detach()), num_samples=8)


def test_two_optimizers_stay_below_and_say_so():
    def run(recipe):
        torch.manual_seed(0)
        model = TwoOptimizers()
        optimizers = {name: torch.optim.Adam(getattr(model, name).parameters(), lr=1e-2) for name in ("maker", "judge")}
        runner = IterBasedRunner(model, optimizer=optimizers, max_iters=8, step=recipe, work_dir="out")
        runner.register_training_hooks(dict(policy="fixed"), None)
        runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
        return runner

    runner = run("graph")
    assert any("not a graph: the model steps several optimizers itself" in line for line in runner.step.explain())
    for ours, eager in zip(runner.model.parameters(), run("eager").model.parameters(), strict=True):
        assert torch.equal(ours, eager)


def test_a_hook_that_is_always_called_is_named():
    class Always(Hook):
        def after_train_iter(self, runner):
            pass

    runner, _ = make(MLP, "graph", 4, hooks=[Always()])
    runner.run([[vectors(i) for i in range(4)]], [("train", 1)])
    assert any("Always is called at every iteration" in line for line in runner.step.explain())
