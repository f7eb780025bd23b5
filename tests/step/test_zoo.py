"""Whole iterations as graphs against eager, over the zoo: losses, buffers, counters, random state.

Here the graphs are interpreted: what is tested is the tracing, the update in it, the guards and the verification. The
slow tests compile them.
"""

from __future__ import annotations

import pytest
import torch
from step.runs import graph_of, interpret, state_of, train
from step.zoo import ZOO

GRAPHS = [name for name, family in ZOO.items() if family.below is None]


def compare(name, iters, ema=None):
    family = ZOO[name]
    graphed, losses = train(family, "graph", iters, ema=ema)
    random_after = torch.get_rng_state()
    eager, wanted = train(family, "eager", iters, ema=ema)
    assert graph_of(graphed).num_calls >= iters - 2, graph_of(graphed).explain()
    assert losses == pytest.approx(wanted, rel=family.rtol)
    assert torch.equal(random_after, torch.get_rng_state())  # as many draws: a resume is exact
    ours, theirs = state_of(graphed), state_of(eager)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "num_batches" in key or key.endswith(" step"):
            assert torch.equal(ours[key], value)
        elif "running_var" in key:
            torch.testing.assert_close(ours[key], value, rtol=10 * family.rtol, atol=1e-6)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_trains_as_eager_does(name, monkeypatch):
    interpret(monkeypatch)
    compare(name, 7, ema=2 if name in ("mlp", "tied", "depthwise") else None)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_compiled_graph_trains_as_eager_does(name, inductor_cache):
    compare(name, 50, ema=2)


@pytest.mark.parametrize("name", [name for name, family in ZOO.items() if family.below])
def test_what_is_no_graph_stays_below_and_says_why(name, monkeypatch):
    interpret(monkeypatch)
    family = ZOO[name]
    runner, losses = train(family, "graph")
    assert any(family.below in line for line in graph_of(runner).explain())
    assert losses == train(family, "fused")[1]
