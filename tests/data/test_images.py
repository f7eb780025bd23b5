"""Folders, lists and arrays of images: what they hold, and that build_dataloader makes batches of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrunner import ImageArray, ImageFolder, ImageList, build_dataloader


@pytest.fixture
def tree() -> Path:
    """Two classes and a stray file; an image in a folder below, one with a capital extension, one that is no image."""
    root = Path("images")
    rng = np.random.default_rng(0)
    for name in ("b/two.JPG", "b/one.png", "a/deep/three.jpeg", "a/zero.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / name)
    (root / "b" / "notes.txt").write_text("no image")
    (root / "stray.jpg").write_bytes(b"")
    return root


def test_a_folder_as_torchvision_sees_it(tree):
    dataset = ImageFolder(tree)
    assert dataset.CLASSES == ("a", "b")
    assert [str(Path(file).relative_to(tree)) for file in dataset.files] == [
        "a/zero.jpg", "a/deep/three.jpeg", "b/one.png", "b/two.JPG",
    ]  # fmt: skip
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.labels.dtype == torch.int64
    assert len(dataset) == 4
    assert len(ImageFolder(tree, extensions=[".jpg"], pipeline="ClassificationEval")) == 2


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda root: Path("elsewhere"), FileNotFoundError, "no such folder: .*elsewhere"),
        (lambda root: root / "a" / "deep", ValueError, "has no folders: one for each class"),
        (lambda root: (root / "c").mkdir() or root, ValueError, "images/c has no images"),
    ],
)
def test_folders_that_are_missing_or_empty(tree, spoil, error, says):
    with pytest.raises(error, match=says):
        ImageFolder(spoil(tree))


def test_a_list_in_a_file(tree):
    (tree / "list.txt").write_text("b/one.png 7\n\nstray name.jpg   -1\n")
    dataset = ImageList(tree / "list.txt")
    assert dataset.files == [str(tree / "b/one.png"), str(tree / "stray name.jpg")]
    assert dataset.labels.tolist() == [7, -1]
    assert ImageList(str(tree / "list.txt"), root="/data").files[0] == "/data/b/one.png"


def test_a_list_of_pairs():
    assert ImageList([("x.jpg", 3)]).files == ["x.jpg"]
    assert ImageList([("x.jpg", 3)], root="/data").files == ["/data/x.jpg"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.jpg\n", "line 1: a path, a blank and a whole number are expected, got 'a.jpg'"),
        ("a.jpg 1\nb.jpg one\n", "line 2"),
        ("a.jpg 1.5\n", "line 1"),
        ("\n", "lists no images"),
    ],
)
def test_lists_that_cannot_be_read(text, says):
    Path("list.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        ImageList("list.txt")


def test_lists_that_are_missing_or_empty():
    with pytest.raises(FileNotFoundError):
        ImageList("nowhere.txt")
    with pytest.raises(ValueError, match="the list of images is empty"):
        ImageList([])


IMAGES = np.zeros((5, 6, 7, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "error", "says"),
    [
        (IMAGES.astype(np.float32), None, TypeError, "images must be uint8"),
        (IMAGES[0], None, TypeError, "images must be uint8"),
        (IMAGES[:0], None, ValueError, "there are no images"),
        ("nowhere.npy", None, FileNotFoundError, "nowhere.npy"),
        (IMAGES, [0, 1], ValueError, "there are 5 images, but 2 labels"),
        (IMAGES, [0.5] * 5, TypeError, "labels must be integers"),
        (IMAGES, np.zeros((5, 1), int), TypeError, "labels must be integers"),
    ],
)
def test_arrays_that_do_not_fit(images, labels, error, says):
    with pytest.raises(error, match=says):
        ImageArray(images, labels)


def test_build_dataloader_makes_batches_of_each(tree):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (4, 40, 50, 3), dtype=np.uint8)
    np.save("images.npy", images)
    np.save("labels.npy", np.array([2, 0, 1, 3], dtype=np.int16))
    pipeline = dict(type="ClassificationTrain", size=32)
    entries = [(str(tree / "a/zero.jpg"), 2), (str(tree / "b/one.png"), 0)] * 2
    seen = {}
    for config in (
        dict(type="ImageFolder", root=str(tree), pipeline=pipeline),
        dict(type="ImageList", entries=entries, pipeline=pipeline, unreadable="skip"),
        dict(type="ImageArray", images="images.npy", labels="labels.npy", pipeline=pipeline),
        dict(type="ImageArray", images=images, labels=torch.tensor([2, 0, 1, 3]), pipeline=pipeline),
    ):
        loader = build_dataloader(config, samples_per_gpu=3, workers_per_gpu=0, seed=1, dist=False)
        assert len(loader) == 2
        assert loader.batch_size == 3
        batches = list(loader)
        assert [tuple(batch["img"].shape) for batch in batches] == [(3, 3, 32, 32), (1, 3, 32, 32)]
        assert batches[0]["gt_label"].dtype == torch.int64
        seen.setdefault(config["type"], []).append(torch.cat([batch["img"] for batch in batches]))
    assert torch.equal(*seen["ImageArray"])  # mapped or in memory
    assert np.array_equal(np.load("images.npy"), images)


def test_accuracy(tree):
    scores = torch.tensor([[3.0, 1], [0, 1], [0, 1], [2, 1]])  # classes 0, 1, 1, 0 of 0, 0, 1, 1
    assert ImageFolder(tree).evaluate(list(scores)) == {"acc": 0.5}
    with pytest.raises(ValueError, match="3 results for 4 samples"):
        ImageFolder(tree).evaluate(list(scores[:3]))
