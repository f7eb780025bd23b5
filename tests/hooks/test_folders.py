"""Names of files that a template makes, and folders that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from runner.helpers import TinyModel, batches

from fastrunner import CheckpointHook, EpochBasedRunner
from fastrunner.hooks.folders import numbered


@pytest.mark.parametrize(
    ("name_of", "numbers"),
    [
        ("epoch_{}.pth", [3, 12]),
        ("epoch_{:03d}.pth", [7]),
        ("{}.pth", [5]),
        ("latest.pth", []),
        ("{}_{}.pth", []),
        ("ep.ch_{}.pth", []),
    ],
)
def test_numbered(name_of, numbers):
    for name in ("epoch_3.pth", "epoch_12.pth", "epoch_007.pth", "epoch_x.pth", "epoch_3.pth.tmp", "5.pth"):
        Path(name).touch()
    Path("epoch_9.pth").mkdir()
    assert sorted(numbered(".", name_of)) == numbers


def test_the_newest_stay_whatever_gap_there_is():
    """mmcv stops deleting at the first file that is missing."""
    runner = EpochBasedRunner(TinyModel(), max_epochs=4, work_dir="out")
    Path("out/epoch_90.pth").touch()  # of another run: not ours to judge
    runner.register_checkpoint_hook(dict(interval=1))
    runner.run([batches()], [("train", 1)])
    Path("out/epoch_3.pth").unlink()
    runner._max_epochs = 6
    runner.hooks[0].max_keep_ckpts = 2
    runner.run([batches()], [("train", 1)])
    assert sorted(p.name for p in Path("out").glob("epoch*")) == ["epoch_5.pth", "epoch_6.pth", "epoch_90.pth"]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(out_dir="s3://bucket/x"), ValueError, "local folders only"),
        (dict(file_client_args=dict(backend="petrel")), ValueError, "local folders only"),
        (dict(out_dir=3), TypeError, "out_dir must be a str"),
    ],
)
def test_what_is_not_a_local_folder_is_refused_when_the_hook_is_made(arguments, error, says):
    with pytest.raises(error, match=says):
        CheckpointHook(**arguments)
    CheckpointHook(file_client_args=dict(backend="disk"))
