"""State that tracing would bake in is found around one eager step, each kind with its name; harmless models pass."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastrunner.step.guards import SilentState, batch_key, quick_key

CALLS = 0


class Model(nn.Module):
    """A linear classifier whose step may do something else besides."""

    def __init__(self, besides=None):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(3))
        self.count, self.history, self.table = 0, [], {"scale": 1.0}
        self.generator = np.random.default_rng(0)
        self.array = np.zeros(2)
        self.besides = besides

    def train_step(self, batch, optimizer=None):
        if self.besides is not None:
            self.besides(self, batch)
        loss = F.cross_entropy(self.drop(self.norm(self.layer(batch["x"]))), batch["y"])
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch["y"]))


def batch():
    return dict(x=torch.randn(5, 4), y=torch.tensor([0, 1, 2, 0, 1]))


def moved_by(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = SilentState(model)
    model.train_step(batch(), optimizer)["loss"].backward()
    optimizer.step()
    return state.moved()


def count(model, batch):
    model.count += 1


def count_on_class(model, batch):
    type(model).calls = getattr(type(model), "calls", 0) + 1


def count_in_global(model, batch):
    global CALLS
    CALLS += 1


def reassign(model, batch):
    model.mean = 0.9 * model.mean + 0.1 * batch["x"].mean()


@pytest.mark.parametrize(
    ("besides", "says"),
    [
        (lambda model, batch: random.random(), "python's random"),
        (lambda model, batch: np.random.rand(), "numpy.random"),
        (lambda model, batch: model.generator.random(), "Model.generator"),
        (count, "Model.count"),
        (count_on_class, "Model.calls"),
        (count_in_global, "test_guards.CALLS"),
        (lambda model, batch: model.history.append(1.0), "Model.history"),
        (lambda model, batch: model.table.update(scale=2.0), "Model.table"),
        (lambda model, batch: model.array.__iadd__(1), "Model.array"),
        (lambda model, batch: setattr(model.drop, "p", 0.3), "drop.p"),
        (reassign, "another tensor into mean"),
    ],
)
def test_silent_state_is_named(besides, says):
    found = moved_by(Model(besides))
    assert any(says in reason for reason in found), found
    assert len(found) == 1  # and nothing else is


@pytest.mark.parametrize("besides", [None, lambda model, batch: model.mean.add_(1)])
def test_dropout_batch_norm_and_writes_into_buffers_are_not_silent(besides):
    assert moved_by(Model(besides)) == []


def test_cycles_nan_and_large_tables_do_not_disturb():
    model = Model()
    model.itself, model.nan = [model], float("nan")
    model.itself.append(model.itself)
    model.vocabulary = {str(i): i for i in range(50_000)}
    assert moved_by(model) == []


def test_the_batch_is_known_by_value_where_it_is_no_tensor():
    def metas(scale):
        return dict(x=torch.zeros(2, 3), metas=[dict(scale=scale, name="a.jpg")])

    assert batch_key(metas(1.0)) == batch_key(metas(1.0))
    assert batch_key(metas(1.0)) != batch_key(metas(2.0))
    assert batch_key(metas(1.0)) != batch_key(metas(1))
    assert batch_key(metas(float("nan"))) == batch_key(metas(float("nan")))
    assert batch_key(metas(np.zeros(2))) != batch_key(metas(np.ones(2)))
    for leaf in (bytearray(b"x"), object()):  # no value, or one that is only equal to itself
        with pytest.raises(TypeError, match=type(leaf).__name__):
            batch_key(dict(x=leaf))


@pytest.mark.parametrize("key", [batch_key, quick_key])
@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(2, 4), torch.zeros(2)),
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2)),
        (torch.zeros(3, 2).t(), torch.zeros(2)),
        (torch.zeros(2, 3, requires_grad=True), torch.zeros(2)),
        (torch.zeros(2, 3, device="meta"), torch.zeros(2)),
        (torch.zeros(2, 3),),
        [torch.zeros(2, 3), torch.zeros(2)],
    ],
)
def test_another_batch_has_another_key(key, other):
    one = (torch.zeros(2, 3), torch.zeros(2))
    assert key(one) == key((torch.ones(2, 3), torch.ones(2)))
    assert key(one) != key(other)


def test_the_quick_key_leaves_other_batches_to_the_thorough_one():
    assert quick_key(dict(x=torch.zeros(2), n=3)) is None
    assert quick_key(torch.zeros(2)) is None
    assert quick_key(dict(a=torch.zeros(2))) != quick_key(dict(b=torch.zeros(2)))


def test_parameters_that_an_attribute_lists_too_are_no_silent_state():
    model = Model()
    model.lstm = nn.LSTM(4, 4)  # keeps its parameters in a list besides
    model.weights = [model.layer.weight]
    assert moved_by(model) == []


def test_a_tensor_that_is_no_buffer_is_named_when_it_is_written_to():
    model = Model(lambda model, batch: model.plain.add_(1))
    model.plain = torch.zeros(2)
    assert ["Model.plain" in reason for reason in moved_by(model)] == [True]
