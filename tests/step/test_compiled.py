"""Recipe compile: eager's results, named submodules, broken graphs, shapes that change, a compiler that fails."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from step.runs import train
from step.zoo import ZOO, Model, vectors
from torch import nn

import fastrunner.step.compiled as compiled_module

BRANCH = ZOO["branch"]


class Parts(Model):
    """Two submodules, the second with a branch on data, which is no graph but is compiled around."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.backbone, self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh()), nn.Linear(8, 10)

    def forward(self, x):
        z = self.head(self.backbone(x))
        return z * 2 if z.mean() > 0 else z

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        return dict(loss=loss, log_vars=dict(loss=loss.item()), num_samples=8)


PARTS = replace(BRANCH, model=Parts)


@pytest.fixture(autouse=True)
def in_python(monkeypatch):
    """Dynamo and AOTAutograd as they are, but what they make is run by torch: no C++ is compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_it = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compile_it(self, backend="aot_eager", **kwargs))
    yield
    torch._dynamo.reset()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("modules", "names"), [((), ("",)), (("backbone", "head"), ("backbone", "head"))])
def test_compiled_modules_train_as_eager_does(modules, names):
    runner, losses = train(PARTS, None, step=dict(recipe="compile", modules=modules))
    assert losses == pytest.approx(train(PARTS, "eager")[1], rel=1e-5)
    assert runner.step._compiled.compiled == names
    assert any("torch.compile on" in line for line in runner.explain().splitlines())
    if not modules:
        (pieces,) = re.findall(r"on the model: (\d+) graphs", "\n".join(runner.step.explain()))
        assert int(pieces) >= 1  # before the branch on data, and behind it where that computes something


@pytest.mark.timeout(300)
def test_a_train_step_that_calls_only_parts_has_them_compiled_and_shapes_may_change():
    batches = [vectors(i, size=4 + i % 3) for i in range(6)]
    runner, losses = train(BRANCH, None, step="compile", batches=batches)
    assert runner.step._compiled.compiled == ("body",)
    assert losses == pytest.approx(train(BRANCH, "eager", batches=batches)[1], rel=1e-5)


def test_a_submodule_that_there_is_not_is_named(caplog):
    runner, losses = train(PARTS, None, step=dict(recipe="compile", modules=["neck"]))
    assert "'neck'" in runner.step.reasons["compile"]
    assert "body, backbone, head" in caplog.text
    assert losses == train(PARTS, "fused")[1]


class BackendError(Exception):
    __module__ = "torch._dynamo.exc"


def test_a_compiler_that_fails_is_one_warning(monkeypatch, caplog):
    def fails(self, **kwargs):
        def call(*args):
            raise BackendError("no C++ compiler found")

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", fails)
    _, losses = train(PARTS, None, step="compile")
    assert losses == train(PARTS, "fused")[1]
    assert len([r for r in caplog.records if "no C++ compiler found" in r.getMessage()]) == 1


def test_a_users_error_stays_a_users_error():
    class Broken(Parts):
        def forward(self, x):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(replace(BRANCH, model=Broken), None, step="compile")
    assert not compiled_module._of_compiler(ValueError("mine"))
