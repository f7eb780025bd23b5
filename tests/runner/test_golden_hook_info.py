"""``get_hook_info()`` and ``get_priority`` give mmcv 1.7.2's answers (golden/hook_info.json)."""

from __future__ import annotations

import pytest
from golden import hook_info, scenarios

import fastrunner

GOLDEN = scenarios.golden("hook_info")

# Decided differently: our CheckpointHook also acts at after_run (it saves there when runner.stop() ended the run), and
# our EMAHook around val iterations and at the end of the iteration runner's loop.
CHECKPOINT = f"(NORMAL      ) {'CheckpointHook':<35}\n"
EMA = f"({45:<12}) {'EMAHook':<35}\n"
FIRST = f"({33:<12}) {'Probeall':<35}\n"  # before both


def as_decided(text):
    added = {}
    if "EMAHook" in text:
        added |= dict.fromkeys(("before_val_iter", "after_val_iter", "after_val_epoch"), EMA)
    if "CheckpointHook" in text:
        added["after_run"] = CHECKPOINT
    for stage, line in added.items():
        head, _, tail = text.partition(f"{stage}:\n")
        ahead = FIRST if tail.startswith(FIRST) else ""
        text = f"{head}{stage}:\n{ahead}{line}{tail.removeprefix(ahead)}"
    return text


@pytest.mark.parametrize("name", hook_info.CASES)
def test_texts_and_priorities_are_mmcvs(name):
    expected = GOLDEN[name]
    if isinstance(expected, str):
        expected = as_decided(expected)
    assert scenarios.play("hook_info", name, fastrunner) == expected
