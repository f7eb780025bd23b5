"""The parts around a runner give what mmcv 1.7.2's give (golden/library.json)."""

from __future__ import annotations

import pytest
from golden import library, scenarios

import fastrunner

GOLDEN = scenarios.golden("library")


@pytest.mark.parametrize("name", library.CASES)
def test_results_are_mmcvs(name):
    expected = GOLDEN[name]
    if name == "load_checkpoint":  # decided: a file says which package wrote it
        *others, last = expected
        expected = [*others, last.replace("'iter', 'mmcv_version'", "'fastrunner_version', 'iter'")]
    assert scenarios.play("library", name, fastrunner) == expected
