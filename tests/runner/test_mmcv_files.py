"""Checkpoints that mmcv 1.7.2 wrote load, and their runs go on as in mmcv, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import mmcv_files

import fastrunner

GOLDEN = json.loads((mmcv_files.FOLDER / "mmcv_files.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="recorded with torch's AVX2 kernels, which fuse multiply and add: other CPUs round differently",
)
@pytest.mark.parametrize("kind", mmcv_files.CASES)
def test_a_run_of_mmcv_goes_on(kind, tmp_path):
    runner = mmcv_files.prepare(fastrunner, kind, str(tmp_path))
    runner.resume(mmcv_files.path_of(kind))
    saved = mmcv_files.SAVED_AT[kind] * (1 if kind == "iter" else mmcv_files.BATCHES)
    assert runner.iter == saved  # meta["iter"] of iter_6.pth is 5: mmcv itself would repeat an iteration
    assert torch.load(mmcv_files.path_of(kind), weights_only=False)["meta"]["iter"] == saved - (kind == "iter")
    messages = runner.meta["hook_msgs"]
    assert (messages["best_score"], messages["best_ckpt"]) == (0.75, "work/best_acc.pth")
    assert runner.meta["CLASSES"] == ("cat", "dog")
    # The file holds no place in the data, so the iteration runner counts epochs from 0 again, as mmcv does.
    assert mmcv_files.finish(runner) == {**GOLDEN[kind], "epoch": 0 if kind == "iter" else 3}


def test_a_file_under_another_name_counts_as_it_says(tmp_path):
    renamed = tmp_path / "model.pth"
    renamed.write_bytes(Path(mmcv_files.path_of("iter")).read_bytes())
    runner = mmcv_files.prepare(fastrunner, "iter", str(tmp_path))
    runner.resume(str(renamed))
    assert runner.iter == 5
    (tmp_path / "latest.pth").symlink_to(mmcv_files.path_of("iter"))
    runner.resume(str(tmp_path / "latest.pth"))
    assert runner.iter == 6


def test_weights_load_strictly(tmp_path):
    model = mmcv_files.Toy()
    content = fastrunner.load_checkpoint(model, mmcv_files.path_of("epoch"), strict=True)
    assert content["meta"]["mmcv_version"] == "1.7.2"
    assert torch.equal(model.w, content["state_dict"]["w"])
