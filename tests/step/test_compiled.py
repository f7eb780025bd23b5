"""Recipe compile: eager's results, named submodules, broken graphs, shapes that change, compilers that fail or err."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from step.runs import interpret_halves, train
from step.zoo import ZOO, Model, vectors
from torch import nn

from fastrunner.step import compiled as compiled_module
from fastrunner.step import torch_private

BRANCH = ZOO["branch"]


class Parts(Model):
    """Two submodules, and a branch on data, which is no graph but is compiled around."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.backbone, self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.2)), nn.Linear(8, 10)
        self.modes = []

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
    interpret_halves(monkeypatch)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("modules", "names"), [((), ("",)), (("backbone", "head"), ("backbone", "head"))])
def test_compiled_modules_train_as_eager_does(modules, names):
    runner, losses = train(PARTS, None, step=dict(recipe="compile", modules=modules))
    assert losses == pytest.approx(train(PARTS, "eager")[1], rel=1e-5)
    assert runner.step._compiled.compiled == names
    (made, ready), *_ = re.findall(r"(\d+) graphs, (\d+) of them", "\n".join(runner.step.explain()))
    assert int(made) == int(ready) >= len(names)


def test_graph_breaks_are_listed_with_the_users_line_and_torchs_reason():
    runner, _ = train(PARTS, None, step="compile")
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "return z * 2" in text)
    breaks = [each for each in runner.explain().splitlines() if "a graph breaks at" in each]
    assert len(breaks) == 1
    assert f"{__file__}:{line}: Data-dependent branching" in breaks[0]


def test_a_train_step_that_calls_only_parts_has_them_compiled():
    runner, losses = train(BRANCH, None, step="compile")
    assert runner.step._compiled.compiled == ("body",)
    assert losses == pytest.approx(train(BRANCH, "eager")[1], rel=1e-5)


def test_the_second_shape_is_compiled_for_all_shapes():
    batches = [vectors(i, size=4 + i % 5) for i in range(10)]
    runner, losses = train(ZOO["mlp"], None, iters=10, step="compile", batches=batches)
    assert losses == pytest.approx(train(ZOO["mlp"], "eager", 10, batches=batches)[1], rel=1e-5)
    assert "2 graphs, 2 of them compiled" in "\n".join(runner.step.explain())


class Unrolled(Model):
    """As many layers as the batch has rows: each batch needs a graph of its own."""

    def __init__(self):
        super().__init__(nn.Linear(16, 10))

    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0.1
        return self.body(x)

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=8)


def test_a_model_that_needs_new_graphs_all_the_time_goes_on_without(caplog):
    family, batches = replace(BRANCH, model=Unrolled), [vectors(i, size=2 + i) for i in range(12)]
    runner, losses = train(family, None, iters=12, step="compile", batches=batches)
    assert losses == pytest.approx(train(family, "eager", 12, batches=batches)[1], rel=1e-5)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "more than 6 kinds" in warnings[0]
    assert "more than 6 kinds" in "\n".join(runner.step.explain())


def test_validation_runs_the_modules_as_they_are():
    runner, _ = train(PARTS, None, step="compile")
    assert runner.model.__dict__["_compiled_call_impl"] is None


def test_a_submodule_that_there_is_not_is_named(caplog):
    runner, losses = train(PARTS, None, step=dict(recipe="compile", modules=["neck"]))
    assert "'neck'" in runner.step.reasons["compile"]
    assert "body, backbone, head" in caplog.text
    assert losses == train(PARTS, "fused")[1]


def fails(*args, **kwargs):
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("fault", "says"), [(fails, "InvalidCxxCompiler"), (full_disk, "No space left")])
def test_a_compiler_that_fails_is_one_warning(fault, says, monkeypatch, caplog):

    monkeypatch.setattr(torch_private, "compile_half", fault)
    runner, losses = train(PARTS, None, step="compile")
    assert losses == train(PARTS, "fused")[1]
    assert len([r for r in caplog.records if says in r.getMessage()]) == 1
    assert says in "\n".join(runner.step.explain())


def test_an_error_of_dynamos_is_one_warning_and_draws_nothing_twice(monkeypatch, caplog):
    def broken(self, graph, inputs):
        torch.rand(3)
        raise RuntimeError("no such graph")  # dynamo makes a BackendCompilerFailed of it

    monkeypatch.setattr(compiled_module.CompiledModules, "_capture", broken)
    _, losses = train(PARTS, None, step="compile")
    assert losses == train(PARTS, "fused")[1]
    assert len([r for r in caplog.records if "no such graph" in r.getMessage()]) == 1


def test_wrong_code_is_refused(monkeypatch, caplog):
    """A backward that forgets one output."""
    right = torch_private.compile_half

    def wrong(graph, inputs, options, context):
        run = right(graph, inputs, options, context)
        if not options.get("is_backward"):
            return run
        return lambda args: [None if g is None else g * 1.001 for g in run(args)]

    monkeypatch.setattr(torch_private, "compile_half", wrong)
    runner, losses = train(PARTS, None, step="compile")
    assert losses == train(PARTS, "fused")[1]
    assert "differs from eager's" in runner.step._compiled.refused
    assert len([r for r in caplog.records if "differs from eager's" in r.getMessage()]) == 1


def test_training_does_not_see_the_comparison():
    class Draws(Parts):
        def forward(self, x):
            return super().forward(x) * (1 + random.random())

    family = replace(BRANCH, model=Draws)
    random.seed(3)
    _, losses = train(family, None, step="compile")
    random.seed(3)
    assert losses == pytest.approx(train(family, "eager")[1], rel=1e-5)


def test_a_step_that_counts_in_python_is_run_once_an_iteration_and_not_compared():
    class Counts(Parts):
        calls = 0

        def train_step(self, batch, optimizer=None, **kwargs):
            self.calls += 1
            return super().train_step(batch, optimizer)

    runner, _ = train(replace(BRANCH, model=Counts), None, step="compile")
    assert runner.model.calls == 8
    assert any("not compared with eager" in line and "calls" in line for line in runner.step.explain())


def test_a_users_error_stays_a_users_error():
    class Broken(Parts):
        def forward(self, x):
            if self.modes:
                raise ValueError("mine")
            self.modes.append(1)
            return super().forward(x)

    with pytest.raises(ValueError, match="mine"):
        train(replace(BRANCH, model=Broken), None, step="compile")
    assert not compiled_module._of_compiler(ValueError("mine"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["branch", "autoencoder", "vit"])
def test_compiled_by_inductor(name, inductor_cache, monkeypatch):
    monkeypatch.undo()
    family = ZOO[name]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inductor_cache))
    runner, losses = train(family, None, step="compile", iters=20)
    assert losses == pytest.approx(train(family, "eager", 20)[1], rel=1e-5)
    assert not runner.step._compiled.refused
    assert runner.step._compiled._num_ready > 0


def test_a_checkpoint_inside_is_refused_before_a_gradient_is_wrong(caplog):
    runner, losses = train(ZOO["gpt"], None, step="compile")
    assert losses == train(ZOO["gpt"], "fused")[1]
    assert len([r for r in caplog.records if "checkpoint activations" in r.getMessage()]) == 1
    assert "checkpoint activations" in runner.step._compiled.refused
