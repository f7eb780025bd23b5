"""With all hooks at once, every call, weight, lr, line and file is mmcv 1.7.2's (golden/together.json)."""

from __future__ import annotations

import re

import pytest
import torch
from golden import scenarios, together

import fastrunner

GOLDEN = scenarios.golden("together")

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="recorded with torch's AVX2 kernels, which fuse multiply and add: other CPUs round differently",
)

# Decided differently, each with its reason.
OURS_ONLY = {
    # val iterations see the averages in the iteration runner too
    *(f"EMAHook.{stage}" for stage in ("before_val_iter", "after_val_iter", "after_val_epoch")),
    "CheckpointHook.after_run",  # saves what runner.stop() ended
    # a run without an optimizer fails before it starts; ranks exchange gradients once a window
    *(f"GradientCumulativeOptimizerHook.{stage}" for stage in ("before_run", "before_train_iter")),
}
MMCVS_ONLY = (
    "Checkpoints will be saved to",  # ours: only where they are not in the work_dir
    "Loss will be divided by",  # ours: nothing to worry about
)


def without_decisions(name, result):
    iterations = name.startswith("iter")
    # the iteration runner counts an iteration to the epoch of its batch: see test_events.py
    calls = [[call, "-" if iterations else epoch, iteration] for call, epoch, iteration in result["calls"]]
    result["calls"] = [call for call in calls if call[0] not in OURS_ONLY]
    console = [line for line in result["console"] if not line.startswith(MMCVS_ONLY)]
    if iterations and "v1" in name:  # val iterations, which are averaged with training's, see EMA's averages
        console = [re.sub(r"loss: \S+, error: \S+", "", line) for line in console]
    result["console"] = console
    return result


@pytest.mark.parametrize("plan", ["on", "off"])
@pytest.mark.parametrize("name", together.CASES)
def test_all_hooks_together_are_mmcvs(name, plan, monkeypatch):
    monkeypatch.setenv("FASTRUNNER_PLAN", plan)
    ours, expected = scenarios.play("together", name, fastrunner), scenarios.golden("together")[name]
    assert OURS_ONLY.isdisjoint(call for call, _, _ in expected["calls"])
    assert without_decisions(name, ours) == without_decisions(name, expected)
