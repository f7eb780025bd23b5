"""``--step`` of the bench and of ``fastrunner.train``; FASTRUNNER_STEP goes before both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastrunner.bench.__main__ import main as bench
from fastrunner.bench.__main__ import make_options, make_parser
from fastrunner.step.config import RECIPES
from fastrunner.train import load_config
from fastrunner.train import main as train

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

ROOT = Path(__file__).parents[2]


def run_bench(*options):
    file = Path("out.json")
    short = ["--data", "digits", "--num-warm-iter", "2", "--num-bench-iter", "5", "--no-tax", "--explain"]
    assert bench([*short, "--results-file", str(file), *options]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("recipe", ["eager", "fused"])
def test_the_bench_runs_the_recipe_that_it_is_told(recipe, capfd):
    torch.set_num_threads(1)
    assert run_bench("--step", recipe)["options"]["step"] == recipe
    assert f"recipe {recipe}" in capfd.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bench_takes_every_recipe(recipe):
    assert make_options(make_parser(), ["--step", recipe])[0].step == recipe


def test_the_environment_goes_before_the_option(capfd, monkeypatch):
    monkeypatch.setenv("FASTRUNNER_STEP", "eager")
    run_bench("--step", "fused")
    assert "recipe eager" in capfd.readouterr().out


def run_train(*options):
    work_dir = Path("work")
    changes = ["--cfg-options", "runner.max_epochs=1", "data.samples_per_gpu=512", "checkpoint_config.interval=1"]
    assert train([str(ROOT / "examples/digits_epoch.py"), "--work-dir", str(work_dir), "--no-validate", *options, *changes]) == 0  # fmt: skip # noqa: E501
    return load_config(str(work_dir / "digits_epoch.py"))


@pytest.mark.parametrize("recipe", ["eager", "fused"])
def test_train_runs_the_recipe_that_it_is_told(recipe, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    assert run_train("--step", recipe).runner.step.recipe == recipe  # what is dumped is what ran


@pytest.mark.parametrize("main", [bench, train], ids=["bench", "train"])
def test_a_recipe_that_there_is_not_is_refused_with_those_there_are(main, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["config.py", "--step", "fastest"] if main is train else ["--step", "fastest"])
    said = capfd.readouterr().err
    assert all(recipe in said for recipe in RECIPES)
