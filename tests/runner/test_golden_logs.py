"""Console lines and ``.log.json`` records are mmcv 1.7.2's, character by character (golden/logs.json)."""

from __future__ import annotations

import copy
import json

import pytest
from golden import logs, scenarios

import fastrunner

GOLDEN = scenarios.golden("logs")

# Decided differently: the iteration runner counts an iteration to the epoch of its batch, mmcv the first iteration of
# each epoch to the epoch before (see test_events.py). With 5 batches an epoch, that is iteration 6 of 8.
FIRST_OF_EPOCH_2 = logs.BATCHES + 1


def as_decided(name, recorded):
    """What mmcv wrote, with the epoch of iteration 6 one higher."""
    decided = copy.deepcopy(recorded)
    if name == "iter the other unit":  # by_epoch: counts within a workflow entry, so iteration 6 is the third "2"
        replace(decided["console"], "Epoch [1][2/5]", "Epoch [2][2/5]", hit=2)
        replace(decided["records"], '"epoch": 1, "iter": 2', '"epoch": 2, "iter": 2', hit=2)
    elif name.startswith("iter"):
        old = f'"epoch": 1, "iter": {FIRST_OF_EPOCH_2},'
        for _ in range(sum(old in line for line in decided["records"])):  # two loggers write two
            replace(decided["records"], old, old.replace("1", "2", 1), hit=0)
    return decided


def replace(lines, old, new, hit):
    """In the line that is number ``hit`` of those with ``old``."""
    index = [k for k, line in enumerate(lines) if old in line][hit]
    lines[index] = lines[index].replace(old, new)


@pytest.mark.parametrize("name", logs.CASES)
def test_logs_are_mmcvs(name):
    assert scenarios.play("logs", name, fastrunner) == as_decided(name, GOLDEN[name])


@pytest.mark.parametrize("name", logs.CASES)
def test_every_record_is_one_json_object(name):
    records = [json.loads(line) for line in scenarios.play("logs", name, fastrunner)["records"]]
    assert records
    assert all(record.get("mode") in ("train", "val") or "seed" in record for record in records)
