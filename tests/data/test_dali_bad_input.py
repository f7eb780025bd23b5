"""What goes wrong in a DALI pipeline arrives in the main thread, says what it is, and leaves nothing running."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import fn, pipeline_def

from fastrunner import ClassificationEval, ClassificationTrain, DaliLoader, build_dataloader, sample_input
from fastrunner.data.dali.producer import Producer
from fastrunner.data.order import epoch_indices

N, SIZE = 23, (24, 32)


def make(dataset, **kwargs) -> DaliLoader:
    arguments = {"pipeline": ClassificationTrain(SIZE), "batch_size": 4, "num_threads": 1, "seed": 5, "shuffle": False}
    return DaliLoader(dataset, **{**arguments, **kwargs})


def with_broken(folder, broken: dict[int, bytes | None]):
    """The data set, with some files replaced: their content, or None for no such file."""
    files = list(folder.files)
    for index, content in broken.items():
        file = Path(f"broken{index}.jpg").absolute()
        if content is not None:
            file.write_bytes(content)
        files[index] = str(file)
    return type(folder)(files, folder.labels)


def half(folder) -> bytes:
    whole = Path(folder.files[3]).read_bytes()
    return whole[: len(whole) // 2]


# A file that cannot be read: raise.


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not a jpeg at all", "nvImageCodec"), ("half", "decode"), (None, "no such file"), (b"", "empty")],
    ids=["garbage", "truncated", "missing", "empty"],
)
@pytest.mark.parametrize("pipeline", [ClassificationTrain(SIZE), ClassificationEval(SIZE)], ids=["train", "eval"])
def test_a_broken_file_is_named(folder, content, reason, pipeline):
    content = half(folder) if content == "half" else content
    list(make(folder, pipeline=pipeline))  # whatever DALI starts once a process
    gc.collect()
    threads = len(os.listdir("/proc/self/task"))
    loader = make(with_broken(folder, {14: content}), pipeline=pipeline)
    seen: list[int] = []

    def read_all() -> None:
        for batch in loader:
            seen.extend(batch["gt_label"].tolist())

    with pytest.raises(RuntimeError, match=rf"cannot read .*broken14\.jpg \(sample 14\): .*{reason}") as caught:
        read_all()
    assert seen == list(range(12))  # at its turn, not when it was tried ahead
    assert isinstance(caught.value.__cause__, RuntimeError)  # DALI's own message
    assert len(os.listdir("/proc/self/task")) == threads  # though the error is still in somebody's hands
    loader.seek(0, 4)  # past the broken file it goes on
    assert next(iter(loader))["gt_label"].tolist() == [16, 17, 18, 19]


def test_an_error_waits_for_its_turn_where_the_thread_is_ahead_of_who_waits(folder, monkeypatch):
    loader = make(with_broken(folder, {10: None}), prefetch=4)  # in the third batch
    wait = Producer._wait

    def wait_late(self):
        deadline = time.monotonic() + 60
        while self._error is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return wait(self)

    monkeypatch.setattr(Producer, "_wait", wait_late)
    batches = iter(loader)
    assert [len(next(batches)["img"]) for _ in range(2)] == [4, 4]
    with pytest.raises(RuntimeError, match="broken10"):
        next(batches)


def test_a_broken_file_that_was_made_ahead_and_dropped_is_nobody_s_business(folder):
    loader = make(with_broken(folder, {10: None}), prefetch=4)
    next(iter(loader))
    loader.seek(0, 4)
    assert [len(batch["img"]) for batch in loader] == [4, 3]


# Or skip.


def readable(ids: list[int], broken: set[int]) -> list[int]:
    """What the ids of an epoch become: a broken one is replaced by the next that is not, around the end."""
    result = []
    for place, index in enumerate(ids):
        behind = ids[place:] + ids
        result.append(next(other for other in behind if other not in broken) if index in broken else index)
    return result


@pytest.mark.parametrize("shuffle", [False, True])
def test_broken_files_are_skipped_and_counted(folder, caplog, shuffle):
    broken = {3: b"garbage", 4: None, 13: half(folder), 22: b""}  # two neighbours; the last of the epoch
    loader = make(with_broken(folder, broken), unreadable="skip", shuffle=shuffle)
    whole = make(folder, shuffle=shuffle)
    images = {}
    for batch in whole:
        images.update(zip(batch["gt_label"].tolist(), batch["img"], strict=True))
    with caplog.at_level(logging.WARNING, logger="fastrunner"):
        batches = list(loader)
    assert [len(batch["img"]) for batch in batches] == [4, 4, 4, 4, 4, 3]  # batches keep their size
    seen = torch.cat([batch["gt_label"] for batch in batches]).tolist()
    order = epoch_indices(N, seed=5, epoch=0, shuffle=shuffle).tolist()
    assert seen == readable(order, set(broken))
    for label, image in zip(seen, torch.cat([batch["img"] for batch in batches]), strict=True):
        assert torch.equal(image, images[label])
    assert set(loader.unreadable_samples) == set(broken)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    assert all(message.startswith("skipped ") for message in messages)
    assert messages[-1].endswith("; 4 unreadable of 23 samples so far")
    assert any("broken4.jpg (sample 4): no such file" in message for message in messages)
    before = loader.samples_fed
    assert len(list(loader)) == 6  # known now: nothing fails any more
    assert loader.samples_fed == before + N
    assert len(caplog.records) == 4


def test_skipping_does_not_depend_on_where_it_starts(folder):
    dataset = with_broken(folder, dict.fromkeys((2, 9, 10, 17), b""))
    wanted = list(make(dataset, unreadable="skip", shuffle=True))
    loader = make(dataset, unreadable="skip", shuffle=True)
    loader.seek(0, 3)
    for one, other in zip(loader, wanted[3:], strict=True):
        assert one["gt_label"].tolist() == other["gt_label"].tolist()
        assert torch.equal(one["img"], other["img"])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_files_that_are_all_broken_are_an_error(folder, batch_size):
    dataset = with_broken(folder, dict.fromkeys(range(N), b"garbage"))
    with pytest.raises(RuntimeError, match=r"the pipeline fails on every sample, such as .*broken"):
        list(make(dataset, unreadable="skip", batch_size=batch_size))


def test_an_unknown_policy(folder):
    with pytest.raises(ValueError, match="unreadable must be one of raise, skip, got 'ignore'"):
        make(folder, unreadable="ignore")


# Pipelines that do not fit, or raise.


def raises(image):
    raise KeyError("mine")


@pipeline_def
def calls_python():
    return fn.python_function(fn.decoders.image(sample_input("encoded")), function=raises)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_python_function_that_raises(folder, policy):
    with pytest.raises(RuntimeError, match="KeyError: 'mine'"):
        list(make(folder, pipeline=calls_python, unreadable=policy, batch_size=8))


@pipeline_def
def window_outside():
    """Not sample_input("window"), and wrong: half of the window is outside."""
    where = sample_input("uniform", count=2)
    return fn.slice(sample_input("array"), where * 0.0 + 0.5, where * 0.0 + 1.0, axes=[0, 1])


def test_a_window_outside_of_the_image(folder):
    class Arrays:
        images = np.zeros((6, 8, 8, 3), np.uint8)

        def __len__(self) -> int:
            return 6

    with pytest.raises(RuntimeError, match=r"sample 0: .*out of bounds"):
        list(make(Arrays(), pipeline=window_outside))


@pipeline_def
def raises_itself():
    raise ZeroDivisionError("while it is defined")


@pipeline_def
def no_inputs():
    return fn.random.uniform(range=[0.0, 1.0])


@pipeline_def
def two_outputs():
    return sample_input("index"), sample_input("label")


@pipeline_def
def unknown_kind():
    return sample_input("pixels")


@pipeline_def
def no_numbers():
    return sample_input("uniform", count=0)


@pipeline_def
def asks_for_arrays():
    return sample_input("array")


def not_a_pipeline(**kwargs):
    return 7


@pytest.mark.parametrize(
    ("pipeline", "error", "says"),
    [
        (raises_itself, ZeroDivisionError, "while it is defined"),
        (no_inputs, ValueError, r"calls no sample_input\(\)"),
        (two_outputs, ValueError, "has 2 outputs, but 1 are named"),
        (unknown_kind, ValueError, "kind must be one of index, label"),
        (no_numbers, ValueError, "count must be >= 1, got 0"),
        (asks_for_arrays, TypeError, "needs a data set with `images`: Folder has none"),
        (not_a_pipeline, TypeError, "must make a nvidia.dali Pipeline, got int"),
    ],
)
def test_pipelines_that_do_not_fit(folder, pipeline, error, says):
    with pytest.raises(error, match=says):
        list(make(folder, pipeline=pipeline))


@pytest.mark.parametrize(
    ("pipeline", "error", "says"),
    [
        (7, TypeError, "must be a config, a name, or a function"),
        ("ClasificationTrain", KeyError, "ClassificationTrain"),
        (dict(type="ClassificationTrain", sizes=3), TypeError, "size"),
        (dict(type="ClassificationTrain", size=0), ValueError, "size must be >= 1"),
        (dict(type="ClassificationTrain", flip=2), ValueError, "flip must be a probability"),
        (dict(type="ClassificationTrain", scale=(0, 1)), ValueError, "scale must be shares"),
        (dict(type="ClassificationTrain", mean=[1]), ValueError, "mean and std go together"),
        (dict(type="ClassificationTrain", mean=[1], std=[0]), ValueError, "std must be > 0"),
        (dict(type="ClassificationTrain", device="tpu"), ValueError, "device must be one of cpu, gpu, mixed"),
        (dict(type="ClassificationEval", size=32, resize=16), ValueError, "resize must be at least size"),
    ],
)
def test_pipeline_configs_that_make_no_sense(folder, pipeline, error, says):
    with pytest.raises(error, match=says):
        make(folder, pipeline=pipeline)


def test_sample_input_outside_of_a_loader():
    with pytest.raises(RuntimeError, match="for pipelines that a DaliLoader builds"):
        two_outputs(batch_size=1, num_threads=1, device_id=None)


# Data sets that do not fit, or raise.


class Encoded:
    def __init__(self, encoded) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return 9


def no_bytes(index: int) -> bytes:
    raise OSError(f"cannot fetch {index}")


@pytest.mark.parametrize("pipeline", [ClassificationTrain(SIZE), ClassificationEval(SIZE)], ids=["train", "eval"])
def test_a_data_set_that_raises(pipeline):
    with pytest.raises(OSError, match="cannot fetch"):
        list(make(Encoded(no_bytes), pipeline=pipeline))


def test_bytes_that_are_no_image():
    with pytest.raises(RuntimeError, match=r"cannot read sample 0: .*nvImageCodec"):
        list(make(Encoded(lambda index: b"no image")))


@pytest.mark.parametrize("images", [np.zeros((4, 8, 8, 3), np.float32), np.zeros((4, 8, 8), np.uint8)])
def test_arrays_of_another_type_or_shape(images):
    class Arrays:
        def __len__(self) -> int:
            return 4

    dataset = Arrays()
    dataset.images = images
    with pytest.raises(TypeError, match=r"images must be uint8, \(N, H, W, C\), got"):
        list(make(dataset))
    with pytest.raises(TypeError, match=r"images must be uint8, \(N, H, W, C\), got"):
        build_dataloader(dict(type="ImageArray", images=images), 2, 1)


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


def test_an_empty_data_set(folder):
    with pytest.raises(ValueError, match="data set Folder has no samples"):
        make(type(folder)([], torch.empty(0, dtype=torch.int64)))


def test_without_dali(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install fastrunner\[dali\]"):
        make(folder)
