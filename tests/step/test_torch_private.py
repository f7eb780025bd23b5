"""What recipes rely on in torch without a promise: this test fails first when torch changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as checkpoint_home
from torch.utils.checkpoint import checkpoint

from fastrunner.step import torch_private
from fastrunner.step.torch_private import Unfit, missing, swapped, tensor_guard, trace


def traced(body, *args):
    return trace(body, args, lambda: None)


def test_this_torch_has_all_of_it():
    assert missing() is None


def test_importing_recipes_imports_no_compiler():
    code = (
        "import sys, fastrunner.step.graph, fastrunner.step.choose\n"
        "print([m for m in sys.modules if m.startswith(('torch._inductor', 'torch._dynamo'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_trace_keeps_writes_in_place_and_moves_no_generator():
    def body(a, b):
        a.mul_(2)
        return (torch.nn.functional.dropout(a + b, 0.5),)

    before = torch.get_rng_state()
    graph = traced(body, torch.ones(3), torch.ones(3))
    assert torch.equal(before, torch.get_rng_state())
    a = torch.ones(3)
    graph(a, torch.ones(3))
    assert a.tolist() == [2, 2, 2]
    assert not torch.equal(before, torch.get_rng_state())  # the graph draws from torch's own


def test_swapped_follows_tied_weights_and_swaps_back():
    model = nn.ModuleDict(dict(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    model["b"].weight = model["a"].weight
    mine = model["a"].weight
    with swapped(model, {"a.weight": torch.zeros(2, 2)}):
        assert model["b"].weight.sum() == 0
    assert model["b"].weight is model["a"].weight is mine


def test_a_checkpoint_is_inlined_under_every_name():
    def body(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = checkpoint(lambda z: torch.nn.functional.dropout(z, 0.5).exp(), x, use_reentrant=False)
            z = checkpoint_home.checkpoint(torch.sin, y, use_reentrant=True)
            return torch.autograd.grad(z.sum(), x)

    graph = traced(body, torch.ones(4))
    assert sum("bernoulli" in str(node.target) for node in graph.graph.nodes) == 1
    assert checkpoint is checkpoint_home.checkpoint  # and put back


def test_host_reads_are_told_of_and_tensor_hooks_refused():
    told = []
    graph = trace(lambda x: (x.sum().item(),), (torch.ones(2),), lambda: told.append(1))
    assert told == [1]
    assert any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
    with pytest.raises(Unfit, match="tensor hook"):
        traced(lambda x: (x.register_hook(print),), torch.ones(2))
    assert torch.Tensor.item(torch.ones(())) == 1


@pytest.mark.slow  # test_graph.py compiles one all the way in the quick suite
@pytest.mark.timeout(300)
def test_a_compiled_graph_consumes_a_list_of_inputs(inductor_cache):
    def body(a, b):
        a.add_(b)
        return (a.sum(),)

    args = (torch.ones(3), torch.ones(3))
    run, inner = torch_private.compile_graph(traced(body, *args), args)
    assert inner  # the callable below the wrappers: a third less a call
    a = torch.ones(3)
    inputs = [a, torch.ones(3)]
    assert run(inputs)[0] == 6
    assert a.tolist() == [2, 2, 2]


def test_each_node_knows_the_line_it_came_from():
    def body(x):
        return (x.sin(),)  # not called ``forward``, which is all that torch looks for

    (node,) = (node for node in traced(body, torch.ones(3)).graph.nodes if node.op == "call_function")
    assert "test_torch_private.py" in node.stack_trace
    assert "x.sin()" in node.stack_trace


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(2, 4),
        torch.ones(3, 2).t(),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3, device="meta"),
        nn.Parameter(torch.ones(2, 3), requires_grad=False),
    ],
)
def test_a_guard_tells_other_tensors(other):
    guard = tensor_guard([torch.ones(2, 3), torch.ones(2)])
    assert guard(torch.zeros(2, 3), torch.zeros(2))
    assert not guard(other, torch.zeros(2))
