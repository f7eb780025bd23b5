"""DaliLoader: what comes out, in which order, from any place, and what happens when a file is broken."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from fastrunner.data.dali import DaliLoader, crop_and_mirror
from fastrunner.data.order import epoch_indices
from fastrunner.data.rng import uniforms

N, SIZE = 23, (24, 32)


@dataclass
class Folder:
    files: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Crops of a real photograph; sizes and name lengths differ. ``labels[i] == i``, so a batch names its samples."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    photograph = Image.fromarray(data.coffee())
    path = tmp_path_factory.mktemp("jpg")
    files = []
    for i in range(N):
        file = path / f"{'x' * (i % 5)}{i}.jpg"
        photograph.crop((10 * i, 5 * i, 10 * i + 120 + 7 * i, 5 * i + 100 + 3 * i)).save(file, quality=92)
        files.append(str(file))
    return Folder(files, torch.arange(N))


def make(folder: Folder, **kwargs: object) -> DaliLoader:
    arguments: dict[str, object] = {"batch_size": 4, "size": SIZE, "augment": True, "num_threads": 1, "seed": 5}
    return DaliLoader(folder, **{**arguments, **kwargs})  # type: ignore[arg-type]


def take(loader: DaliLoader, count: int) -> list[dict[str, Tensor]]:
    return list(islice(loader, count))


def epochs(loader: DaliLoader, count: int) -> list[dict[str, Tensor]]:
    return [batch for _ in range(count) for batch in loader]


def assert_same(got: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert one["gt_label"].tolist() == other["gt_label"].tolist()
        assert torch.equal(one["img"], other["img"])


# The numbers behind the augmentation.


def test_crops_stay_inside_and_have_the_area_asked_for():
    crops = crop_and_mirror(uniforms(0, 0, np.arange(5_000), 5), scale=(0.3, 0.6))
    left, top, width, height, mirror = crops.T
    assert crops[:, :4].min() >= 0
    assert (left + width).max() <= 1 + 1e-6  # float32's rounding of a sum
    assert (top + height).max() <= 1 + 1e-6
    assert (width * height).min() >= 0.3 - 1e-6
    assert (width * height).max() <= 0.6 + 1e-6
    assert set(np.unique(mirror)) == {0, 1}
    assert 0.45 < mirror.mean() < 0.55  # 7 standard deviations


# What comes out.


def pillow(file: str, box: tuple[float, ...] | None) -> np.ndarray:
    with Image.open(file) as image:
        w, h = image.size
        left, top, right, bottom = box or (0.0, 0.0, 1.0, 1.0)
        crop = image.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))
        resized = crop.resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized).astype(np.int64)


# Both resize with a triangle filter over decoded pixels, but decode and round differently: measured means are at most
# 0.4 of 255 levels (99 % of the values within 3). A wrong mirror gives at least 13.
def assert_like(image: Tensor, wanted: np.ndarray) -> None:
    difference = np.abs(image.numpy().transpose(1, 2, 0).astype(np.int64) - wanted)
    assert difference.mean() < 1.0, difference.mean()


def test_whole_images_like_pillow(folder):
    batches = list(make(folder, augment=False, shuffle=False))
    assert [batch["gt_label"].tolist() for batch in batches] == [
        list(range(start, min(start + 4, N))) for start in range(0, N, 4)
    ]
    for batch in batches:
        assert batch["img"].dtype == torch.uint8
        assert batch["img"].shape == (len(batch["gt_label"]), 3, *SIZE)
        for image, label in zip(batch["img"], batch["gt_label"], strict=True):
            assert_like(image, pillow(folder.files[label], None))


def test_crops_like_pillow(folder):
    mirrored = []
    for batch in make(folder, seed=9):
        for image, label in zip(batch["img"], batch["gt_label"], strict=True):
            x, y, w, h, mirror = crop_and_mirror(uniforms(9, 0, label[None].numpy(), 5))[0].tolist()
            wanted = pillow(folder.files[label], (x, y, x + w, y + h))
            assert_like(image, wanted[:, ::-1] if mirror else wanted)
            mirrored.append(mirror)
    assert 0 < sum(mirrored) < N


@pytest.mark.parametrize("batch_size", [1, 4])  # 23 batches an epoch: more than are prepared together
def test_order_is_epoch_indices(folder, batch_size):
    loader = make(folder, batch_size=batch_size)
    for epoch in range(3):
        seen = torch.cat([batch["gt_label"] for batch in loader]).tolist()
        assert seen == epoch_indices(N, seed=5, epoch=epoch).tolist()


def test_an_image_does_not_depend_on_its_batch(folder):
    large, small = (torch.cat([b["img"] for b in epochs(make(folder, batch_size=n), 2)]) for n in (4, 1))
    assert torch.equal(large, small)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [4, 4, 4, 4, 4, 3]),
        ({"drop_last": True}, [4, 4, 4, 4, 4]),
        ({"rank": 1, "world_size": 2}, [4, 4, 4]),  # 24 with DistributedSampler's padding
        ({"batch_size": 100}, [23]),
    ],
)
def test_batch_sizes_and_length(folder, options, sizes):
    loader = make(folder, **options)
    for _ in range(2):  # the incomplete batch stands between two epochs
        assert [len(batch["img"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)


def test_ranks_share_an_epoch(folder):
    seen = [torch.cat([b["gt_label"] for b in make(folder, rank=rank, world_size=3)]).tolist() for rank in range(3)]
    assert len({len(ids) for ids in seen}) == 1
    assert set().union(*seen) == set(range(N))


# Going anywhere.


@pytest.mark.parametrize("augment", [True, False])
def test_fresh_loader_continues_with_the_same_bytes(folder, augment):
    wanted = epochs(make(folder, augment=augment), 3)
    for epoch, position in ((0, 4), (1, 0), (1, 3), (2, 5)):
        loader = make(folder, augment=augment, num_threads=2)
        loader.seek(epoch, position)
        assert_same(epochs(loader, 3 - epoch), wanted[6 * epoch + position :])


def test_seek_back_and_forth_on_a_running_loader(folder):
    wanted = epochs(make(folder), 2)
    loader = make(folder)
    take(loader, 3)
    for epoch, position in ((1, 4), (0, 0), (0, 4), (1, 1)):
        loader.seek(epoch, position)
        assert_same(take(loader, 2), wanted[6 * epoch + position :][:2])


def test_seek_across_what_is_prepared_together(folder):
    wanted = epochs(make(folder, batch_size=1), 1)
    for position in (0, 15, 16, 17, 22):
        loader = make(folder, batch_size=1)
        loader.seek(0, position)
        assert_same(take(loader, 3), wanted[position : position + 3])


def test_seek_decodes_nothing_that_it_skips(folder):
    loader = make(folder, prefetch=2)
    loader.seek(0, 3)
    assert loader.samples_fed == 0
    assert sum(len(batch["img"]) for batch in loader) == 11
    assert loader.samples_fed == 11 + 2 * 4  # and the two batches that are ready for the next epoch


def test_next_epoch_is_ready_and_used(folder):
    loader = make(folder, prefetch=3)
    epochs(loader, 4)
    assert loader.samples_fed == 4 * N + 3 * 4  # nothing was made twice
    loader.seek(4, 0)  # where it is anyway: the runners seek at every epoch
    epochs(loader, 1)
    assert loader.samples_fed == 5 * N + 3 * 4


def test_evaluation_epochs_are_alike(folder):
    loader = make(folder, augment=False, shuffle=False)
    first = epochs(loader, 1)
    loader.seek(7, 0)  # evaluated after seven epochs of training
    assert_same(epochs(loader, 1), first)
    assert loader.samples_fed == 2 * N + 2 * 4


def test_seed_can_be_set_as_a_resume_does(folder):
    loader = make(folder, seed=1)
    take(loader, 2)
    loader.seed = 5
    loader.seek(0, 0)
    assert_same(epochs(loader, 1), epochs(make(folder, seed=5), 1))


def test_seek_to_the_end_of_an_epoch(folder):
    loader = make(folder)
    loader.seek(0, 6)
    assert list(loader) == []
    assert_same(take(loader, 1), epochs(make(folder), 2)[6:7])


@pytest.mark.parametrize(("epoch", "position"), [(0, -1), (0, 7), (-1, 0)])
def test_seek_to_no_batch(folder, epoch, position):
    with pytest.raises(ValueError, match=rf"no batch {position} in epoch {epoch}: an epoch has 6 batches"):
        make(folder).seek(epoch, position)


def test_only_the_newest_iterator_is_valid(folder):
    loader = make(folder)
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(RuntimeError, match="no longer valid"):
        next(old)
    assert next(new)["gt_label"].tolist() == epoch_indices(N, seed=5, epoch=1)[:4].tolist()


# Memory and threads.


def test_images_live_as_long_as_someone_holds_them(folder):
    loader = make(folder)
    held = [(batch["img"], batch["img"].clone()) for batch in epochs(loader, 3)]
    loader.close()
    del loader
    gc.collect()
    assert len({image.data_ptr() for image, _ in held}) == len(held)
    assert all(torch.equal(image, copy) for image, copy in held)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("end", ["close", "forget", "leave"])
def test_threads_end(folder, end):
    take(make(folder), 1)  # whatever DALI starts once a process
    gc.collect()
    before = num_threads()
    loader = make(folder, num_threads=2)
    batches = iter(loader)
    next(batches)
    assert num_threads() > before
    if end == "close":
        loader.close()
        assert num_threads() == before
        assert_same(take(loader, 1), epochs(make(folder), 2)[6:7])  # closed is not broken: the next epoch
    elif end == "leave":
        batches.close()  # type: ignore[attr-defined]
    del loader, batches
    gc.collect()
    assert num_threads() == before


# Bad input.


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not a jpeg at all", "nvImageCodec"), ("half", "decode"), (None, "no such file"), (b"", "empty")],
    ids=["garbage", "truncated", "missing", "empty"],
)
def test_broken_file_is_named(folder, tmp_path, content, reason):
    broken = tmp_path / "broken.jpg"
    if content == "half":
        whole = Path(folder.files[3]).read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        broken.write_bytes(content)
    files = list(folder.files)
    files[14] = str(broken)
    loader = make(Folder(files, folder.labels), shuffle=False)
    seen: list[int] = []

    def read_all() -> None:
        for batch in loader:
            seen.extend(batch["gt_label"].tolist())

    with pytest.raises(RuntimeError, match=rf"cannot read .*broken\.jpg \(sample 14\): .*{reason}") as caught:
        read_all()
    assert seen == list(range(len(seen)))  # nothing wrong before
    assert len(seen) <= 12
    assert isinstance(caught.value.__cause__, RuntimeError)  # DALI's own message
    loader.seek(0, 4)  # past the broken file it goes on
    assert take(loader, 1)[0]["gt_label"].tolist() == [16, 17, 18, 19]


def test_broken_file_that_was_skipped_is_nobodys_business(folder, tmp_path):
    files = list(folder.files)
    files[10] = str(tmp_path / "missing.jpg")
    loader = make(Folder(files, folder.labels), shuffle=False)
    take(loader, 1)
    loader.seek(0, 4)
    assert [len(batch["img"]) for batch in loader] == [4, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must"),
        ({"num_threads": 0}, "num_threads must"),
        ({"prefetch": 0}, "prefetch must"),
    ],
)
def test_counts_must_be_positive(folder, options, message):
    with pytest.raises(ValueError, match=f"{message} be >= 1, got 0"):
        make(folder, **options)


def test_empty_data_set():
    with pytest.raises(ValueError, match="Folder has no files"):
        make(Folder([], torch.empty(0, dtype=torch.int64)))


def test_without_dali(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install fastrunner\[dali\]"):
        make(folder)


def test_importing_the_module_does_not_import_dali():
    code = "import sys, fastrunner.data.dali; print([m for m in sys.modules if m.startswith('nvidia')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


ROOT = Path(__file__).parents[2]
