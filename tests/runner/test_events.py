"""Both runners fire the same events in the same order, with the same counters, as mmcv 1.7.2 (golden/events.json)."""

from __future__ import annotations

import pytest
from golden import events, scenarios

import fastrunner

GOLDEN = scenarios.golden("events")

# What is decided differently from mmcv, each with its reason. Only the iteration runner differs.


def iterators_when_needed(trace):
    """mmcv starts every loader before the run, val's too, although it may be long until one is needed; ours start
    with their first batch, so that no workers wait and a resume can seek first."""
    trace = [row[:] for row in trace]
    early = [row for row in trace if row[0].endswith("loader.iter") and row[4] is None]
    assert early, "mmcv starts the iterators before the run has a mode"
    for row in early:
        trace.remove(row)
        loader = row[0].partition(".")[0]
        first = next((k for k, row in enumerate(trace) if row[0] == f"{loader}.batch 0"), None)
        if first is not None:
            trace.insert(first, [row[0], *trace[first][1:]])
    return trace


def epoch_of_the_batch(trace):
    """mmcv reads the loader's epoch before it takes the batch, so that the first iteration of each epoch counts to the
    epoch before; ours counts it to its own, which is what a resume continues from."""
    trace, finished, epoch = [row[:] for row in trace], 0, 0
    for row in trace:
        row[1] = epoch
        finished += row[0] == "train loader.end"
        if row[0].startswith("train loader.batch"):
            epoch = finished  # from here on; the runner hears of it when it has the batch
    return trace


DECIDED = {"epoch": [], "iter": [iterators_when_needed, epoch_of_the_batch]}


@pytest.mark.parametrize("name", events.CASES)
def test_events_are_mmcvs(name):
    expected = GOLDEN[name]
    for decision in DECIDED[events.CASES[name]["kind"]]:
        expected = decision(expected)
    assert scenarios.play("events", name, fastrunner) == expected


def test_the_decisions_are_needed():
    """A difference that is gone should leave the list."""
    name = "iter t1v1 3 batches max 7"
    for decision in DECIDED["iter"]:
        others = [other for other in DECIDED["iter"] if other is not decision]
        expected = GOLDEN[name]
        for other in others:
            expected = other(expected)
        assert scenarios.play("events", name, fastrunner) != expected
