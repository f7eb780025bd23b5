"""Checkpoint files are whole or not there, and cannot run code when they are read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrunner import ConfigDict
from fastrunner.checkpoint import file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = str(tmp_path / "a.pth")
    file.write({"n": 1}, path)

    def full(checkpoint, stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        file.write({"n": 2}, path)
    monkeypatch.undo()
    assert file.read(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


def test_latest_points_at_the_newest_relatively_and_at_all_times(tmp_path):
    for name in ("iter_1.pth", "iter_2.pth"):
        file.write({"name": name}, str(tmp_path / name))
        file.link_latest(str(tmp_path), name)
        assert (tmp_path / "latest.pth").readlink() == Path(name)
        assert file.read(str(tmp_path / "latest.pth")) == {"name": name}
    assert sorted(os.listdir(tmp_path)) == ["iter_1.pth", "iter_2.pth", "latest.pth"]


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "iter_9.pth"
    file.write({"w": torch.zeros(1000)}, str(path))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(RuntimeError, match=r"iter_9\.pth cannot be read .* damaged"):
        file.read(str(path))
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"iter_9\.pth cannot be read"):
        file.read(str(path))


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("went_off",))


def test_code_in_a_file_does_not_run_unless_trusted(tmp_path):
    torch.save({"meta": Bomb()}, "bomb.pth")
    with pytest.raises(RuntimeError, match=r"bomb\.pth holds more than tensors.*trusted=True"):
        file.read("bomb.pth")
    assert not Path("went_off").exists()
    file.read("bomb.pth", trusted=True)
    assert Path("went_off").exists()


def test_plain_makes_meta_readable_again(tmp_path):
    meta = ConfigDict(
        score=np.float64(0.5),
        steps=np.arange(3),
        where=Path("x"),
        classes=("a", "b"),
        span=range(2),
        nested=[{"k": {1}}],
    )
    file.write({"meta": file.plain(meta)}, "m.pth")
    assert file.read("m.pth")["meta"] == dict(
        score=0.5, steps=[0, 1, 2], where="x", classes=("a", "b"), span=(0, 1), nested=[{"k": [1]}]
    )


def test_what_is_not_plain_is_kept_with_a_warning_that_names_it():
    value = pickle.Pickler
    with pytest.warns(UserWarning, match=r"meta\['hook_msgs'\]\['it'\] is a builtins\.type.*trusted=True"):
        assert file.plain({"hook_msgs": {"it": value}}) == {"hook_msgs": {"it": value}}
