"""OpenMMLab's _parse_losses, value by value, with tensors where it has numbers."""

from __future__ import annotations

import pytest
import torch

from fastrunner import parse_losses


def test_losses_are_summed_and_all_is_logged():
    weight = torch.tensor(2.0, requires_grad=True)
    losses = dict(
        loss_cls=weight * torch.tensor([1.0, 3.0]),  # mean 4
        loss_bbox=[weight * torch.tensor([1.0]), weight * torch.tensor([2.0, 4.0])],  # 2 + 6
        acc=torch.tensor([50.0]),
    )
    loss, log_vars = parse_losses(losses)
    assert loss.shape == ()
    loss.backward()
    assert weight.grad.item() == 6.0
    assert {name: value.item() for name, value in log_vars.items()} == dict(loss_cls=4, loss_bbox=8, acc=50, loss=12)
    assert list(log_vars) == ["loss_cls", "loss_bbox", "acc", "loss"]
    assert not any(value.requires_grad for value in log_vars.values())


@pytest.mark.parametrize(
    ("losses", "error", "says"),
    [
        (dict(loss=1.0), TypeError, "loss is not a tensor or list of tensors, but a float"),
        (dict(loss=[]), TypeError, "a list that is empty"),
        (dict(loss=[torch.ones(1), 2]), TypeError, "loss is not"),
        (dict(acc=torch.ones(1)), ValueError, "'acc'"),
    ],
)
def test_what_is_no_loss_is_named(losses, error, says):
    with pytest.raises(error, match=says):
        parse_losses(losses)


def test_several_processes_log_the_mean_by_one_all_reduce(monkeypatch):
    calls = []

    def all_reduce(tensor):
        calls.append(tensor.shape)
        tensor.add_(torch.tensor([1.0, 3.0, 2.0]))  # the other process's half

    monkeypatch.setattr("fastrunner.dist.get_dist_info", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    loss, log_vars = parse_losses(dict(loss_a=torch.tensor(2.0), loss_b=torch.tensor(4.0)))
    assert calls == [(3,)]
    assert loss.item() == 6  # its own
    assert [value.item() for value in log_vars.values()] == [2, 5, 5]


def test_a_graph_takes_it(monkeypatch):
    from dataclasses import replace

    from step.runs import graph_of, interpret, train
    from step.zoo import ZOO, Model

    class Mmdet(Model):
        def train_step(self, batch, optimizer=None, **kwargs):
            scores = self.body(batch["x"])
            losses = dict(loss_cls=torch.nn.functional.cross_entropy(scores, batch["y"]), loss_l2=[scores.square()])
            loss, log_vars = parse_losses(losses)
            return dict(loss=loss, log_vars=log_vars, num_samples=8)

    interpret(monkeypatch)
    family = replace(ZOO["mlp"], model=lambda: Mmdet(torch.nn.Linear(16, 10)))
    runner, losses = train(family, "graph")
    assert graph_of(runner).num_calls > 4
    assert losses == pytest.approx(train(family, "eager")[1], rel=1e-5)
