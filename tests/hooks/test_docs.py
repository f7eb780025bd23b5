"""docs/hooks.md tells the truth: its code runs, and its table has every hook with its priority."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from runner.helpers import TinyModel, batches

import fastrunner
from fastrunner import HOOKS, EpochBasedRunner, FusedSGD
from fastrunner.hooks.logger import NOT_CARRIED

TEXT = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()


def test_the_code_runs():
    recipe, own = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    model = TinyModel()
    model.test_step = lambda batch: list(model.layer(batch))
    model.fp16_enabled = False
    runner = EpochBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1, momentum=0.9), max_epochs=2)
    names = dict(vars(fastrunner)["_HOME"])
    space = {name: getattr(fastrunner, name) for name in names}
    space.update(runner=runner, val_loader=batches(2), accuracy=lambda results: float(torch.stack(results).mean()))
    exec(recipe, space)
    exec(own, space)
    try:
        runner.register_custom_hooks(dict(type="GradNormWatchHook", limit=-1.0))
        runner.run([batches(60)], [("train", 1)])
    finally:
        HOOKS.module_dict.pop("GradNormWatchHook", None)
    assert runner.stop_reason == "grad_norm above -1.0"
    assert runner.iter == 50  # an epoch has 60: the histories have the norms of the 4th to the 48th


def test_the_table_has_every_hook():
    named = set(re.findall(r"`(\w+Hook)`", TEXT))
    ours = {name for name, kind in HOOKS.module_dict.items() if kind.__module__.startswith("fastrunner.hooks.")}
    policies = {name for name in ours if "Updater" in name}
    assert named == (ours | {"EvalHook", "DistEvalHook"}) - policies - set(NOT_CARRIED)
