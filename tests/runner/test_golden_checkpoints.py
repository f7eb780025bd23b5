"""Files on disk after each save, their content and the runner's meta are mmcv 1.7.2's (golden/checkpoints.json)."""

from __future__ import annotations

import copy
import re

import pytest
from golden import checkpoints, scenarios

import fastrunner

GOLDEN = scenarios.golden("checkpoints")

# What is decided differently from mmcv, each with its reason.


def adds_resume(name, rows):
    """Ours says which package wrote it, and holds what an exact resume needs under one more key."""
    for content in written(rows):
        content["keys"] = sorted([*content["keys"], "resume"])
        content["meta_keys"] = sorted({*content["meta_keys"], "fastrunner_version"} - {"mmcv_version"})


def epoch_of_the_batch(name, rows):
    """The iteration runner counts an iteration to the epoch of its batch (see test_events.py)."""
    if name.startswith("iter"):
        for row in rows:
            row["epoch"] = row["iter"] // checkpoints.BATCHES
            for content in row["written"].values():
                content["epoch"] = row["epoch"] + 1


def named_by_iteration(name, rows):
    """by_epoch=False in the epoch runner: mmcv writes epoch_N.pth over and over, and notes iter_N.pth as the last
    checkpoint; ours writes the file that it notes."""
    if name != "epoch the other unit":
        return
    files = []
    for row in rows:
        (content,) = row["written"].values()
        new = f"work/iter_{row['iter'] + 1}.pth"
        files.append(new)
        row["written"] = {new: content}
        row["files"] = sorted([*files, "work/latest.pth"])
        row["latest"] = [new.partition("/")[2]]


def keeps_no_more(name, rows):
    """mmcv deletes the multiples of the interval, so that a last checkpoint at another number leaves one too many."""
    keep = checkpoints.CASES[name]["hook"].get("max_keep_ckpts")
    for row in rows if keep else ():
        saved = [file for file in row["files"] if "latest" not in file]
        saved.sort(key=lambda file: int(re.search(r"\d+", file)[0]))
        for file in saved[:-keep]:
            row["files"].remove(file)


DECIDED = [adds_resume, epoch_of_the_batch, named_by_iteration, keeps_no_more]


def written(rows):
    return [content for row in rows for content in row["written"].values()]


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_files_and_meta_are_mmcvs(name):
    expected = copy.deepcopy(GOLDEN[name])
    for decide in DECIDED:
        decide(name, expected)
    assert scenarios.play("checkpoints", name, fastrunner) == expected


def test_every_file_holds_the_weights_of_its_moment():
    contents = [content for name in checkpoints.CASES for content in written(GOLDEN[name])]
    assert len(contents) > 100
    assert all(all(content["state_dict"].values()) for content in contents)
