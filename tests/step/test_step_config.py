"""What a user may say about the step, in a runner's config and in the environment, and what is refused."""

from __future__ import annotations

import pytest
import torch
from runner.helpers import TinyModel, batches

from fastrunner import Config, StepConfig, build_runner
from fastrunner.step.config import make_config


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, StepConfig()),
        ("graph", StepConfig("graph")),
        (dict(recipe="eager", amp="bf16"), StepConfig("eager", amp="bf16")),
        (dict(recipe="compile", modules=["layer"]), StepConfig("compile", ("layer",))),
        (StepConfig("graph"), StepConfig("graph")),
    ],
)
def test_what_can_be_said(given, wanted):
    assert make_config(given) == wanted


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (dict(recipe="fast"), ValueError, "eager, fused, compile, graph, aot, cudagraph, auto"),
        (dict(recepie="graph"), TypeError, "recepie"),
        (3, TypeError, "dict"),
        (dict(amp="int8"), ValueError, "bf16"),
        (dict(recipe="graph", amp="auto"), ValueError, "chosen by recipe 'auto'"),
        (dict(channels_last="auto"), ValueError, "chosen by recipe 'auto'"),
        (dict(channels_last="yes"), ValueError, "channels_last"),
        (dict(recipe="compile", modules="layer"), TypeError, "list of names"),
        (dict(recipe="graph", modules=["layer"]), ValueError, "compile"),
    ],
)
def test_what_is_refused(given, error, says):
    with pytest.raises(error, match=says):
        make_config(given)
    with pytest.raises(error, match=says):
        build_runner(dict(type="IterBasedRunner", max_iters=1, step=given), dict(model=TinyModel()))


def test_the_environment_overrides_the_recipe(monkeypatch):
    assert make_config(dict(recipe="graph", amp="bf16"), "compile") == StepConfig("compile", amp="bf16")
    monkeypatch.setenv("FASTRUNNER_STEP", "eager")
    assert make_config(None, "graph") == StepConfig("eager")
    assert make_config(dict(recipe="compile", modules=["layer"])) == StepConfig("eager")
    assert make_config(dict(recipe="auto", channels_last=True)) == StepConfig("eager", channels_last=True)
    assert make_config(dict(recipe="auto", amp="auto", channels_last="auto")) == StepConfig("eager")
    monkeypatch.setenv("FASTRUNNER_STEP", "fastest")
    with pytest.raises(ValueError, match="fastest"):
        make_config(None)


@pytest.mark.parametrize("kind", ["IterBasedRunner", "EpochBasedRunner"])
def test_a_config_file_says_it(kind):
    length = "max_iters" if kind.startswith("Iter") else "max_epochs"
    config = Config(dict(runner={"type": kind, length: 1, "step": dict(recipe="eager", modules=[])}))
    runner = build_runner(config.runner, dict(model=TinyModel()))
    assert runner.step_config == StepConfig("eager")


@pytest.mark.parametrize("recipe", ["eager", "fused"])
def test_amp_and_layout_reach_train_step(recipe):
    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)
            self.seen = []

        def train_step(self, batch, optimizer=None, **kwargs):
            out = self.conv(batch["img"])
            last = torch.channels_last
            self.seen.append((out.dtype, batch["img"].is_contiguous(memory_format=last), batch["n"]))
            assert self.conv.weight.is_contiguous(memory_format=last)
            loss = out.float().mean()
            return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=2)

    model = Looks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = dict(recipe=recipe, amp="bf16", channels_last=True)
    runner = build_runner(dict(type="IterBasedRunner", max_iters=2, step=step), dict(model=model, optimizer=optimizer))
    runner.register_training_hooks(dict(policy="fixed"), {})
    runner.run([[dict(img=torch.randn(2, 3, 5, 5), n=1)]], [("train", 1)])
    assert model.seen == [(torch.bfloat16, True, 1)] * 2


def test_the_default_calls_the_model_itself():
    model = TinyModel()
    runner = build_runner(dict(type="IterBasedRunner", max_iters=1), dict(model=model))
    assert runner.stepping_model is model
    assert batches(1)  # the data of these tests
