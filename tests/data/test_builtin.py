"""Digits and Photos: sizes, splits, and a cache folder that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from fastrunner.data import builtin
from fastrunner.data.builtin import Digits, Photos, cache_dir, make_photos
from fastrunner.registry import DATASETS, build_from_cfg

FEW = {"train": 6, "val": 3}  # crops a photograph: the real 370 take seconds to make


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(builtin, "_CROPS", FEW)


# Digits.


def test_digits_splits_are_a_partition():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1442, 355)
    ours = torch.cat([train.images, val.images]).reshape(-1, 64).double() * (16 / 255)
    our_labels = torch.cat([train.labels, val.labels]).tolist()
    rows = sorted([*row, label] for row, label in zip(ours.round().tolist(), our_labels, strict=True))
    assert rows == sorted([*row, label] for row, label in zip(images.tolist(), labels, strict=True))


def test_digits_are_stratified():
    for split, share in (("train", 0.8), ("val", 0.2)):
        dataset = Digits(split)
        counts = torch.bincount(dataset.labels, minlength=10)
        # a class has 174 to 183 images; rounding to whole fifths moves its share by less than one image
        assert (counts - share * torch.bincount(torch.cat([Digits(s).labels for s in builtin.SPLITS]))).abs().max() < 1


def test_digits_sample_is_the_arrays_row():
    dataset = build_from_cfg({"type": "Digits", "split": "val"}, DATASETS)
    sample = dataset[7]
    assert sample["img"].dtype == torch.uint8
    assert sample["img"].shape == (1, 8, 8)
    assert sample["gt_label"].dtype == torch.int64
    assert torch.equal(sample["img"], dataset.images[7])
    assert sample["gt_label"] == dataset.labels[7]
    assert dataset.images.max() == 255
    assert len(dataset.CLASSES) == 10


# Photos.


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_photos_are_made_once_and_always_the_same(few, tmp_path):
    first = make_photos(tmp_path / "a")
    made = {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")}
    assert len(made) == 10 * sum(FEW.values())
    assert make_photos(tmp_path / "a") == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")} == made
    assert digest(make_photos(tmp_path / "b")) == digest(first)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.name]  # nothing left over


def test_photos_train_and_val_share_no_pixel():
    for label, name in enumerate(Photos.CLASSES):
        height, width = builtin._photographs()[name]().shape[:2]
        seen = {split: np.zeros((height, width), dtype=bool) for split in builtin.SPLITS}
        for split, mask in seen.items():
            for left, top, right, bottom in builtin._boxes(width, height, split, label):
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height
                mask[top:bottom, left:right] = True
        assert not (seen["train"] & seen["val"]).any()
        assert seen["train"].mean() > 0.5  # and they cover most of their regions
        assert seen["val"].mean() > 0.3


def test_photos_crop_is_of_its_photograph(few, tmp_path):
    dataset = Photos("val", root=tmp_path)
    photograph = Image.fromarray(builtin._photographs()["coffee"]())
    label = Photos.CLASSES.index("coffee")
    index = dataset.labels.tolist().index(label)
    box = builtin._boxes(photograph.width, photograph.height, "val", label)[0]
    with Image.open(dataset.files[index]) as file:
        got = np.asarray(file).astype(int)
    wanted = np.asarray(photograph.crop(box).resize((128, 128), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(got - wanted).mean() < 3  # JPEG at quality 90


@pytest.mark.parametrize("split", ["train", "val"])
def test_photos_samples(few, tmp_path, split):
    dataset = build_from_cfg({"type": "Photos", "split": split, "size": 48, "root": str(tmp_path)}, DATASETS)
    assert len(dataset) == 10 * FEW[split]
    assert torch.bincount(dataset.labels).tolist() == [FEW[split]] * 10
    sample = dataset[0]
    assert sample["img"].shape == (3, 48, 48)
    assert sample["img"].dtype == torch.uint8
    assert sample["gt_label"].dtype == torch.int64
    again = dataset[0]["img"]
    assert torch.equal(again, sample["img"]) == (split == "val")  # training crops are random


def test_photos_through_dali_and_through_pillow_agree(few, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    dataset = Photos("val", size=32, root=tmp_path)
    loader = dataset.make_loader(batch_size=8, num_workers=0, shuffle=False)
    images = torch.cat([batch["img"] for batch in loader])
    labels = torch.cat([batch["gt_label"] for batch in loader])
    assert torch.equal(labels, dataset.labels)
    wanted = torch.stack([dataset[i]["img"] for i in range(len(dataset))])
    # two decoders and two roundings of the same triangle filter: measured 0.4 of 255 levels on average
    assert (images.float() - wanted.float()).abs().mean() < 1


def _make(folder: str, barrier: object) -> None:
    builtin._CROPS = FEW  # type: ignore[assignment]
    barrier.wait()  # type: ignore[attr-defined]
    make_photos(Path(folder))


def test_concurrent_makers_do_not_collide(few, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    makers = [context.Process(target=_make, args=(str(tmp_path), barrier)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    folder = make_photos(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(digest(folder)) == 10 * sum(FEW.values()) + 1


def test_interrupted_maker_leaves_nothing(few, tmp_path, monkeypatch):
    photographs = builtin._photographs()

    def broken() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "_photographs", lambda: {**photographs, "rocket": broken})
        with pytest.raises(KeyboardInterrupt):
            make_photos(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert json.loads((make_photos(tmp_path) / "manifest.json").read_text())["classes"] == list(Photos.CLASSES)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRUNNER_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FASTRUNNER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fastrunner"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fastrunner"


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write the cache folder .*file.*; name another in FASTRUNNER_CACHE"):
        make_photos(tmp_path / "file")


def test_something_else_in_the_photos_place(few, tmp_path):
    (tmp_path / builtin._VERSION / "stray").mkdir(parents=True)
    with pytest.raises(OSError, match=r"is in the way, and has no manifest.json: remove it"):
        make_photos(tmp_path)


@pytest.mark.parametrize("kind", [Digits, Photos])
def test_unknown_split(kind):
    with pytest.raises(ValueError, match="split must be one of train, val, got 'test'"):
        kind("test")


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        Photos(size=0)


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn, which is not installed: pip install fastrunner\[bench\]"):
        Digits()
    with pytest.raises(ImportError, match=r"pip install fastrunner\[bench\]"):
        Photos(root=tmp_path)
