"""Arrays: the fused pass against the same operations one by one in numpy, and loaders that threads do not change."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")

from fastrunner import IterLoader, build_dataloader
from fastrunner.data.arrays import ArrayDataset
from fastrunner.data.operations import Cutout, Normalize, Operation, RandomCrop
from fastrunner.data.rng import uniforms
from fastrunner.registry import OPERATIONS

N, H, W, C = 37, 9, 7, 3
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (N, H, W, C), dtype=np.uint8)
LABELS = np.arange(N) * 10
MEAN, STD = [120.5, 100.0, 99.0], [60.0, 61.0, 62.0]
AUGMENT = [
    dict(type="RandomCrop", size=(8, 6), padding=2, fill=7),
    dict(type="RandomFlip"),
    dict(type="Cutout", size=3, fill=1, prob=0.7),
    dict(type="Normalize", mean=MEAN, std=STD),
    dict(type="Layout", order="CHW"),
]


@pytest.fixture(autouse=True, scope="module")
def kernels_of_their_own(tmp_path_factory):
    """An empty cache folder: what is compiled here is this code's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRUNNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def by_hand(image, numbers):
    """AUGMENT on one image, each operation by itself."""
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=7)
    top, left = int(numbers[0] * (H + 4 - 8 + 1)), int(numbers[1] * (W + 4 - 6 + 1))
    image = padded[top : top + 8, left : left + 6]
    if numbers[2] < 0.5:
        image = image[:, ::-1]
    if numbers[5] < 0.7:
        image = image.copy()
        top, left = int(numbers[3] * 8) - 1, int(numbers[4] * 6) - 1
        image[max(top, 0) : top + 3, max(left, 0) : left + 3] = 1
    scale = np.float32(1) / np.float32(STD)
    return ((image.astype(np.float32) - np.float32(MEAN)) * scale).transpose(2, 0, 1)


def test_the_fused_pass_is_the_operations_one_by_one():
    dataset = ArrayDataset(dict(img=IMAGES, gt_label=LABELS), AUGMENT)
    loader = build_dataloader(dataset, 8, 0, seed=3)
    seen = []
    for epoch in range(2):
        numbers = uniforms(3, epoch, np.arange(N), 6)
        for batch in loader:
            ids = (batch["gt_label"] // 10).tolist()
            seen += ids
            wanted = np.stack([by_hand(IMAGES[i], numbers[i]) for i in ids])
            assert np.array_equal(batch["img"].numpy(), wanted)  # the same operations in float32: the same bits
            assert batch["img"].dtype == torch.float32
    assert sorted(seen) == sorted([*range(N)] * 2)


def test_layouts_and_types():
    planar = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))
    crop, hwc = dict(type="CenterCrop", size=(4, 5)), dict(type="Layout", order="HWC")
    wanted = IMAGES[:, 2:6, 1:6]
    cases = [  # each is compiled: every layout and every type once, not all of them with each other
        (ArrayDataset(dict(img=IMAGES), [crop, dict(type="Layout", order="CHW")]), wanted.transpose(0, 3, 1, 2)),
        (
            ArrayDataset(dict(img=planar), [crop, dict(type="Cast", dtype="float64")], layout="CHW"),
            wanted.transpose(0, 3, 1, 2).astype(np.float64),
        ),
        (
            ArrayDataset(dict(img=planar.astype(np.float32)), [Normalize(2, 4), hwc], layout="CHW"),
            (IMAGES - np.float32(2)) / 4,
        ),
        (ArrayDataset(dict(img=IMAGES.astype(np.int16) - 100), [crop]), wanted.astype(np.int16) - 100),
    ]  # fmt: skip
    for dataset, expected in cases:
        (batch,) = build_dataloader(dataset, N, 0, shuffle=False)
        assert batch["img"].numpy().dtype == expected.dtype
        assert np.array_equal(batch["img"].numpy(), expected)


def test_rows_without_operations_and_other_arrays():
    extra = RANDOM.standard_normal((N, 2, 5))
    dataset = ArrayDataset(dict(x=torch.arange(N), extra=extra), CLASSES=("a", "b"))
    assert dataset.CLASSES == ("a", "b")
    for batch in build_dataloader(dataset, 5, 1, seed=1):
        assert np.array_equal(batch["extra"].numpy(), extra[batch["x"].numpy()])
    assert dataset[36]["x"] == 36
    assert dataset[-1]["x"] == 36
    with pytest.raises(IndexError):
        dataset[37]


def taken(workers, count, seek=None, **options):
    dataset = ArrayDataset(dict(img=IMAGES, gt_label=LABELS), AUGMENT)
    loader = build_dataloader(dataset, 8, workers, seed=5, **options)
    loader.prefetch_over_epoch_end = workers == 2
    endless = IterLoader(loader)
    if seek:
        endless.seek(*seek)
    batches = [{name: tensor.clone() for name, tensor in next(endless).items()} for _ in range(count)]
    endless.close()
    return batches


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_threads_change_nothing_and_neither_does_a_seek(workers):
    whole = taken(0, 13)
    for got, start in ((taken(workers, 13), 0), (taken(workers, 5, seek=(1, 3)), 8)):
        for one, other in zip(got, whole[start:], strict=False):
            assert torch.equal(one["img"], other["img"])
            assert torch.equal(one["gt_label"], other["gt_label"])


def test_files_are_mapped(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    dataset = dict(
        type="ArrayDataset", arrays=dict(img=str(tmp_path / "images.npy"), gt_label=LABELS), operations=AUGMENT
    )
    loader = build_dataloader(dataset, 8, 1, seed=5)
    assert isinstance(loader.dataset.arrays["img"].base, np.memmap)
    assert torch.equal(next(iter(loader))["img"], taken(0, 1)[0]["img"])
    loader.close()


@OPERATIONS.register_module()
class Solarize(Operation):
    pointwise = True

    def __init__(self, threshold):
        self.threshold = threshold

    def constants(self):
        return (self.threshold,)

    @staticmethod
    def value(v, y, x, c, p, k):
        return 255 - v if v >= k[0] else v


class Checkered(Operation):
    """Looks at places, after Normalize: no table can hold it."""

    @staticmethod
    def value(v, y, x, c, p, k):
        return -v if (x + y + c) % 2 else v


class Swing(Operation):
    """Rows rotate: a row may show another one, by a random number."""

    num_uniforms = 1

    @staticmethod
    def draw(u, height, width, k):
        return (int(u[0] * height),)

    @staticmethod
    def row(y, height, p, k):
        return (y + p[0]) % height


def test_users_add_operations():
    dataset = ArrayDataset(
        dict(img=IMAGES),
        [dict(type="Solarize", threshold=100), Swing(), dict(type="Normalize", mean=1, std=2), Checkered()],
    )
    (batch,) = build_dataloader(dataset, N, 0, shuffle=False, seed=2)
    rolls = (uniforms(2, 0, np.arange(N), 1)[:, 0] * H).astype(int)
    solarized = np.where(IMAGES >= 100, 255 - IMAGES, IMAGES)
    rolled = np.stack([np.roll(image, -roll, axis=0) for image, roll in zip(solarized, rolls, strict=True)])
    y, x, c = np.indices((H, W, C))
    wanted = (rolled.astype(np.float32) - 1) * np.float32(0.5) * np.where((x + y + c) % 2, -1, 1)
    assert np.array_equal(batch["img"].numpy(), wanted)


class Raises(Operation):
    num_uniforms = 1

    @staticmethod
    def draw(u, height, width, k):
        if u[0] < 2:
            raise ValueError("this operation is broken")
        return (0,)


class RaisesLater(Operation):
    """On values that compiling does not meet: it runs on the first image."""

    @staticmethod
    def value(v, y, x, c, p, k):
        if v == 255:
            raise ValueError("a pixel is white")
        return v


class Method(Operation):
    def row(self, y, height, p, k):
        return y


class Untyped(Operation):
    @staticmethod
    def value(v, y, x, c, p, k):
        return v.no_such_thing


class Far(Operation):
    """Points far outside without saying what is there: it gets the border, not somebody else's memory."""

    @staticmethod
    def column(x, width, p, k):
        return x + 1_000_000


def test_an_operation_that_raises_is_an_error_in_the_main_thread():
    with pytest.raises(ValueError, match="this operation is broken"):
        ArrayDataset(dict(img=IMAGES), [Raises()])
    images = IMAGES.copy()
    images[0] = 0
    loader = build_dataloader(ArrayDataset(dict(img=images), [RaisesLater()]), 8, 2)
    with pytest.raises(ValueError, match="a pixel is white"):
        list(loader)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastrunner-ring")]


def test_pointing_outside_shows_the_border():
    (batch,) = build_dataloader(ArrayDataset(dict(img=IMAGES), [Far()]), N, 0, shuffle=False)
    assert np.array_equal(batch["img"].numpy(), np.repeat(IMAGES[:, :, -1:], W, axis=2))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ArrayDataset({}), ValueError, "no arrays were given"),
        (lambda: ArrayDataset(dict(a=LABELS[:0])), ValueError, "have no samples"),
        (lambda: ArrayDataset(dict(a=LABELS, b=LABELS[1:])), ValueError, "got {'a': 37, 'b': 36}"),
        (lambda: ArrayDataset(dict(a=["x"])), TypeError, "'a' must be an array or tensor of numbers.*got list"),
        (lambda: ArrayDataset(dict(a=np.array(["x"]))), TypeError, "got an array of <U1"),
        (lambda: ArrayDataset(dict(a=np.array(1.0))), ValueError, "first dimension"),
        (lambda: ArrayDataset(dict(a="nowhere.npy")), FileNotFoundError, "'a': no such file: nowhere.npy"),
        (lambda: ArrayDataset(dict(a=__file__)), ValueError, r"test_arrays.py is no \.npy file"),
        (lambda: ArrayDataset(dict(a=LABELS), key="b"), ValueError, "'b' is none of the arrays a"),
        (lambda: ArrayDataset(dict(a=LABELS), [Normalize(0, 1)]), ValueError, r"\(HWC\), got shape \(\)"),
        (lambda: ArrayDataset(dict(a=IMAGES), [], layout="NHWC"), None, None),
        (lambda: ArrayDataset(dict(a=IMAGES), [Cutout(2)], layout="NHWC"), ValueError, "layout must be HWC or CHW"),
        (lambda: ArrayDataset(dict(a=IMAGES), [RandomCrop(12)]), ValueError, r"window of \(12, 12\) does not fit"),
        (lambda: ArrayDataset(dict(a=IMAGES), [Normalize([1, 2], [1, 1])]), ValueError, "2 means for images of 3"),
        (lambda: ArrayDataset(dict(a=IMAGES), [Method()]), ValueError, "Method.row must be a staticmethod"),
        (lambda: ArrayDataset(dict(a=IMAGES), [Untyped()]), ValueError, "numba cannot compile the operations Untyped"),
        (lambda: ArrayDataset(dict(a=IMAGES), [dict(type="RandomCorp", size=2)]), KeyError, "RandomCrop"),
        (lambda: Normalize(0, 0), ValueError, "std positive"),
        (lambda: Cutout(0), ValueError, "size must be >= 1"),
        (lambda: RandomCrop(3, padding=-1), ValueError, "padding must be >= 0"),
        (lambda: RandomCrop((3, 0)), ValueError, "size must be >= 1"),
    ],
)  # fmt: skip
def test_bad_input(make, error, says):
    if error is None:
        make()
        return
    with pytest.raises(error, match=says):
        make()


def test_a_table_has_the_bits_of_the_arithmetic():
    """The same operations on bytes (through a table) and on the same values in float32 (without one)."""

    def batch(images):
        dataset = ArrayDataset(dict(img=images), AUGMENT)
        return next(iter(build_dataloader(dataset, N, 0, seed=1)))["img"]

    assert torch.equal(batch(IMAGES), batch(IMAGES.astype(np.float32)))


SCRIPT = """
import numpy as np
from fastrunner import build_dataloader
from fastrunner.data.arrays import ArrayDataset
from numba.core import event

np.save("images.npy", np.zeros((3, 9, 9, 3), np.uint8))
with event.install_recorder("numba:compile") as recorder:
    dataset = ArrayDataset(dict(img="images.npy"), [dict(type="RandomFlip"), dict(type="Normalize", mean=1, std=2)])
    made = len(recorder.buffer)
    list(build_dataloader(dataset, 2, 1))
print(made, len(recorder.buffer) - made)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    env = {**os.environ, "FASTRUNNER_CACHE": str(tmp_path)}
    compiled = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        compiled.append([int(count) for count in done.stdout.split()])
    assert compiled[0][0] > 0
    assert compiled[0][1] == 0  # all of it before the first batch
    assert compiled[1] == [0, 0]


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, caplog):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FASTRUNNER_CACHE", str(file))
    with caplog.at_level(logging.WARNING, "fastrunner"):
        ArrayDataset(dict(img=IMAGES[:, :3]), [dict(type="CenterCrop", size=2)])
    assert "compiled at each start" in caplog.text


def test_a_dropped_loader_leaves_no_thread():
    loader = build_dataloader(ArrayDataset(dict(img=IMAGES), [Normalize(0, 1)]), 2, 2)
    next(iter(loader))
    running = [t for t in threading.enumerate() if t.name.startswith("fastrunner-ring")]
    assert len(running) == 2
    del loader
    gc.collect()
    for thread in running:
        thread.join(60)
        assert not thread.is_alive()
    assert Path(__file__).exists()
