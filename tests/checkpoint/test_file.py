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


def test_what_mmcvs_meta_holds_reads_safely():
    meta = dict(score=np.float64(0.5), loss=np.float32(2), iou=np.arange(3.0), ok=np.bool_(True), names=np.array(["a"]))
    meta |= dict(span=range(3), where=Path("x"), kinds=frozenset({1}), z=1j)
    torch.save({"meta": meta}, "m.pth")
    got = file.read("m.pth")["meta"]
    assert str(got) == str(meta)  # arrays do not compare with ==
    torch.save({"meta": np.array([Bomb()], dtype=object)}, "o.pth")
    with pytest.raises(RuntimeError, match=r"o\.pth holds more than tensors"):
        file.read("o.pth")


def old_format(content: object) -> bytes:
    """As torch wrote before 1.6, and MMCV with it."""
    torch.save(content, "old.pth", _use_new_zipfile_serialization=False)
    return Path("old.pth").read_bytes()


@pytest.mark.parametrize("trusted", [False, True])
def test_files_of_old_torch(trusted):
    content = {"w": torch.arange(1000.0)}
    whole = old_format(content)
    assert torch.equal(file.read("old.pth", trusted=trusted)["w"], content["w"])
    for broken in (whole[:2000], whole[:100], bytes(1000), b"<html>404</html>"):
        Path("broken.pth").write_bytes(broken)
        with pytest.raises(RuntimeError, match=r"broken\.pth cannot be read \(.*\): it is damaged, or not"):
            file.read("broken.pth", trusted=trusted)


def test_objects_of_code_that_is_not_there(monkeypatch):
    gone = type("Gone", (), dict(__module__=__name__))
    monkeypatch.setitem(globals(), "Gone", gone)
    torch.save({"it": gone()}, "gone.pth")
    monkeypatch.delitem(globals(), "Gone")
    with pytest.raises(RuntimeError, match=r"gone\.pth holds objects of code that is not there: .*Gone"):
        file.read("gone.pth", trusted=True)
