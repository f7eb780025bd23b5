"""Precision and layout inside graphs: autocast in bfloat16 and float16, channels last, against the recipe below."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from step.runs import graph_of, interpret, state_of, train
from step.zoo import ZOO, Model, cnn

RESNET, MLP = ZOO["resnet"], ZOO["mlp"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch)


@pytest.mark.parametrize(
    ("family", "options", "rtol"),
    [
        (RESNET, dict(channels_last=True), 1e-4),  # another order of sums in each convolution
        (RESNET, dict(amp="bf16"), 2e-2),
        (RESNET, dict(amp="bf16", channels_last=True), 2e-2),
        (MLP, dict(amp="bf16"), 2e-2),
        (MLP, dict(amp="fp16"), 2e-3),
    ],
)
def test_graphs_have_the_precision_and_layout_of_the_recipe_below(family, options, rtol):
    runner, losses = train(family, "graph", 10, step=dict(recipe="graph", **options))
    below, wanted = train(family, "eager", 10, step=dict(recipe="eager", **options))
    assert graph_of(runner).num_calls == 8, graph_of(runner).explain()
    assert losses == pytest.approx(wanted, rel=rtol)
    for (name, ours), theirs in zip(runner.model.named_parameters(), below.model.parameters(), strict=True):
        assert ours.stride() == theirs.stride(), name
        assert ours.dtype == torch.float32
    if "amp" in options:  # and it is that precision, not float32
        exact = train(family, "eager", 10)[1]
        assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) > 1e-5


def test_a_batch_that_lies_channels_last_already_has_a_graph_of_its_own():
    def batch(number):
        plain = RESNET.batch(number)
        x = plain["x"].contiguous(memory_format=torch.channels_last) if number % 2 else plain["x"]
        return dict(plain, x=x)

    family = replace(RESNET, model=lambda: Model(cnn()), batch=batch)
    runner, losses = train(family, "graph", 12)
    assert len(graph_of(runner)._graphs) == 2
    assert losses == pytest.approx(train(family, "eager", 12)[1], rel=1e-4)
    assert state_of(runner)
