"""``import fastrunner`` starts nothing: what it loads is torch's import and fastrunner's own modules.

Each case runs in a fresh interpreter, since this one has imported half the world for the other tests.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch._dynamo", "torch._inductor", "nvidia.dali", "numba", "triton", "tensorboard", "matplotlib")

FIRST_ITERATION = """
import torch
from fastrunner import build_optimizer, build_runner, supervised

model = supervised(torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy)
optimizer = build_optimizer(model, dict(type="FusedSGD", lr=0.1, momentum=0.9))
before = [p.detach().clone() for p in model.parameters()]
runner = build_runner(dict(type="IterBasedRunner", max_iters=1), default_args=dict(model=model, optimizer=optimizer))
runner.register_training_hooks(dict(policy="step", step=[1]), dict(grad_clip=dict(max_norm=1.0)))
batch = dict(img=torch.ones(3, 4), gt_label=torch.zeros(3, dtype=torch.int64))
runner.run([[batch]], [("train", 1)])
assert runner.iter == 1
assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))
"""


def modules_after(code: str) -> set[str]:
    """``sys.modules`` of a fresh interpreter that ran ``code``."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> set[str]:
    return {m for m in modules if any(m == h or m.startswith(f"{h}.") for h in HEAVY)}


@pytest.fixture(scope="module")
def torch_alone() -> set[str]:
    return modules_after("import torch")


def test_the_check_would_notice(torch_alone: set[str]) -> None:
    assert not heavy(torch_alone)  # so whatever shows up below was brought by us
    assert heavy(modules_after("import torch._dynamo")) >= {"torch._dynamo"}


def test_import_brings_nothing_heavy(torch_alone: set[str]) -> None:
    after = modules_after("import fastrunner")
    assert "fastrunner" in after
    assert heavy(after) == set()


def test_first_iteration_with_our_optimizer_brings_no_compiler() -> None:
    # torch.optim's constructors import dynamo and inductor, 2 s; ours must not, nor may anything else on the way.
    assert heavy(modules_after(FIRST_ITERATION)) == set()


def test_every_public_name_resolves() -> None:
    code = """
import fastrunner
names = list(fastrunner.__all__)
assert len(names) == len(set(names)), "a name stands in __all__ twice"
print(len([getattr(fastrunner, name) for name in names]), set(names) <= set(dir(fastrunner)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, listed = run.stdout.split()
    assert int(count) >= 20  # the words of the four steps alone are that many
    assert listed == "True"


def test_unknown_name_is_an_attribute_error() -> None:
    import fastrunner

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fastrunner.no_such_name


def test_type_checkers_see_the_same_names() -> None:
    """``__init__.pyi`` re-exports each public name from the module that ``__init__.py`` loads it from."""
    import fastrunner

    stub = ast.parse(Path(fastrunner.__file__).with_suffix(".pyi").read_text())
    declared = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    loaded = {name: vars(fastrunner)["_HOME"][name] for name in fastrunner.__all__ if name != "__version__"}
    assert declared == loaded
