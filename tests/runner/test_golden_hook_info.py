"""``get_hook_info()`` and ``get_priority`` give mmcv 1.7.2's answers (golden/hook_info.json)."""

from __future__ import annotations

import pytest
from golden import hook_info, scenarios

import fastrunner

GOLDEN = scenarios.golden("hook_info")

# Decided differently, at the stage after_run: our CheckpointHook saves there when runner.stop() ended the run, and our
# TextLoggerHook has nothing to upload there (it has no out_dir).
LOGGER = f"(VERY_LOW    ) {'TextLoggerHook':<35}"
CHECKPOINT = f"(NORMAL      ) {'CheckpointHook':<35}"


def as_decided(text):
    before, stage, after_run = text.partition("after_run:\n")
    return before + stage + after_run.replace(LOGGER, CHECKPOINT)


@pytest.mark.parametrize("name", hook_info.CASES)
def test_texts_and_priorities_are_mmcvs(name):
    expected = GOLDEN[name]
    if isinstance(expected, str):
        expected = as_decided(expected)
    assert scenarios.play("hook_info", name, fastrunner) == expected
