"""What comes out of the ready-made pipelines, and of a user's: compared with Pillow and numpy."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import fn, pipeline_def

from fastrunner import ClassificationEval, ClassificationTrain, DaliLoader, build_dataloader, sample_input
from fastrunner.data.crops import NUM_UNIFORMS, random_resized_crop
from fastrunner.data.rng import uniforms

SIZE = (24, 32)
SEED = 9


def epoch_of(dataset, pipeline, **kwargs) -> dict[str, Tensor | list]:
    """One epoch, in the data set's order."""
    loader = DaliLoader(dataset, pipeline=pipeline, batch_size=4, num_threads=1, seed=SEED, shuffle=False, **kwargs)
    batches = list(loader)
    return {
        name: torch.cat([b[name] for b in batches]) if isinstance(batches[0][name], Tensor) else
        [sample for b in batches for sample in b[name]]
        for name in batches[0]
    }  # fmt: skip


def pillow(file: str, box: tuple[int, int, int, int] | None, size: tuple[int, int]) -> np.ndarray:
    """Decode, crop (top, left, height, width), resize to (height, width)."""
    with Image.open(file) as image:
        if box is not None:
            top, left, height, width = box
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).astype(np.float64)


# Both resize with a triangle filter over decoded pixels, but decode and round differently: measured means are at most
# 0.6 of 255 levels. A wrong mirror gives at least 13, a window that is off by a pixel 2.
def assert_like(image: Tensor, wanted: np.ndarray) -> None:
    difference = np.abs(image.numpy().transpose(1, 2, 0).astype(np.float64) - wanted)
    assert difference.mean() < 1.0, difference.mean()


def wanted_windows(sizes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Windows and mirrors of epoch 0: a sample's numbers are the window's first, then the mirror's."""
    numbers = uniforms(SEED, 0, np.arange(len(sizes)), NUM_UNIFORMS + 1)
    return random_resized_crop(numbers[:, :NUM_UNIFORMS], np.array(sizes)), numbers[:, -1] < 0.5


def sizes_of(files: list[str]) -> list[tuple[int, int]]:
    return [Image.open(file).size[::-1] for file in files]


def test_train_like_pillow(folder):
    got = epoch_of(folder, ClassificationTrain(SIZE))
    windows, mirrors = wanted_windows(sizes_of(folder.files))
    assert got["img"].dtype == torch.uint8
    assert got["img"].shape == (len(folder), 3, *SIZE)
    assert got["gt_label"].tolist() == list(range(len(folder)))
    for image, file, window, mirror in zip(got["img"], folder.files, windows.tolist(), mirrors, strict=True):
        wanted = pillow(file, window, SIZE)
        assert_like(image, wanted[:, ::-1] if mirror else wanted)
    assert 0 < mirrors.sum() < len(folder)


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, False), (1.0, True)])
def test_how_often_it_mirrors(folder, flip, mirrored):
    got = epoch_of(folder, ClassificationTrain(SIZE, scale=(1.0, 1.0), ratio=(0.01, 100.0), flip=flip))
    windows = random_resized_crop(
        uniforms(SEED, 0, np.arange(len(folder)), NUM_UNIFORMS), np.array(sizes_of(folder.files)),
        scale=(1.0, 1.0), ratio=(0.01, 100.0),
    )  # fmt: skip
    for image, file, window in zip(got["img"], folder.files, windows.tolist(), strict=True):
        wanted = pillow(file, window, SIZE)
        assert_like(image, wanted[:, ::-1] if mirrored else wanted)


def test_eval_like_pillow(folder):
    got = epoch_of(folder, ClassificationEval(SIZE, resize=40))
    for image, file in zip(got["img"], folder.files, strict=True):
        height, width = Image.open(file).size[::-1]
        short = 40 / min(height, width)
        resized = pillow(file, None, (round(height * short), round(width * short)))
        top, left = (resized.shape[0] - SIZE[0]) // 2, (resized.shape[1] - SIZE[1]) // 2
        ours = image.numpy().transpose(1, 2, 0)
        differences = [  # where a side is odd, "central" may be either of two pixels
            np.abs(ours - resized[y : y + SIZE[0], x : x + SIZE[1]]).mean()
            for y in (top, top + 1)
            for x in (left, left + 1)
            if y + SIZE[0] <= resized.shape[0] and x + SIZE[1] <= resized.shape[1]
        ]
        # the resized image is a fraction of a pixel longer or shorter than ours
        assert min(differences) < 1.5, differences


def test_a_whole_square_image_is_only_resized(folder, tmp_path):
    Image.open(folder.files[0]).crop((0, 0, 90, 90)).save("square.png")
    dataset = type(folder)(["square.png"], torch.tensor([0]))
    got = epoch_of(dataset, ClassificationEval(32, resize=32))
    assert_like(got["img"][0], pillow("square.png", None, (32, 32)))


def test_eval_is_the_same_in_every_epoch(folder):
    loader = DaliLoader(folder, pipeline="ClassificationEval", batch_size=8, shuffle=False)
    first, second = list(loader), list(loader)
    assert all(torch.equal(a["img"], b["img"]) for a, b in zip(first, second, strict=True))
    assert first[0]["img"].shape == (8, 3, 224, 224)  # the default


@pytest.mark.parametrize("pipeline", [ClassificationTrain, ClassificationEval])
def test_normalised_like_numpy(folder, pipeline):
    mean, std = (120.0, 110.0, 100.0), (50.0, 60.0, 70.0)
    plain = epoch_of(folder, pipeline(SIZE))["img"].double()
    got = epoch_of(folder, pipeline(SIZE, mean=mean, std=std))["img"]
    assert got.dtype == torch.float32
    wanted = (plain - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    # float32 holds numbers up to 5 with an error of 2.4e-7; two operations round
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


def test_channels_last_is_a_matter_of_memory_only(folder):
    plain = epoch_of(folder, ClassificationTrain(SIZE))["img"]
    loader = DaliLoader(
        folder, pipeline=ClassificationTrain(SIZE, channels_last=True), batch_size=4, seed=SEED, shuffle=False
    )
    batches = [batch["img"] for batch in loader]
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in batches)
    assert torch.equal(torch.cat(batches), plain)


class Arrays:
    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_like_pillow(folder, channels):
    with Image.open(folder.files[0]) as file:
        picture = np.asarray(file)[:90, :100, :channels]
    images = np.stack([np.roll(picture, 5 * i, axis=1) for i in range(7)])
    got = epoch_of(Arrays(images), ClassificationTrain(SIZE))
    assert set(got) == {"img"}  # no labels
    windows, mirrors = wanted_windows([(90, 100)] * 7)
    for image, pixels, window, mirror in zip(got["img"], images, windows.tolist(), mirrors, strict=True):
        top, left, height, width = window
        crop = pixels[top : top + height, left : left + width]
        wanted = np.asarray(
            Image.fromarray(crop.squeeze(-1) if channels == 1 else crop).resize(SIZE[::-1], Image.Resampling.BILINEAR)
        ).reshape(*SIZE, channels)
        wanted = (wanted[:, ::-1] if mirror else wanted).astype(np.float64)
        assert np.abs(image.numpy().transpose(1, 2, 0) - wanted).max() <= 1  # Pillow rounds between its two passes
    assert epoch_of(Arrays(images), ClassificationEval(SIZE, resize=40))["img"].shape == (7, channels, *SIZE)


def test_images_that_the_core_cannot_resize_go_through_dali():
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 6), dtype=np.uint8)
    assert epoch_of(Arrays(images), ClassificationTrain(SIZE))["img"].shape == (3, 6, *SIZE)


def test_an_unknown_dali_resizes_by_itself(folder, monkeypatch):
    core = epoch_of(folder, ClassificationTrain(SIZE))["img"]
    monkeypatch.setattr("nvidia.dali.__version__", "3.0")
    for image, wanted in zip(epoch_of(folder, ClassificationTrain(SIZE))["img"], core, strict=True):
        assert_like(image, wanted.numpy().transpose(1, 2, 0).astype(np.float64))


# A user's pipelines.


@pipeline_def(enable_conditionals=True)
def brighter_or_not(strength: float):
    image = fn.resize(fn.decoders.image(sample_input("encoded")), size=SIZE)
    number = sample_input("uniform", count=2)
    if number[0] < 0.5:
        image = fn.cast_like(image * strength, image)
    return image, number, sample_input("index")


def test_a_user_s_pipeline_with_arguments_and_conditions(folder):
    outputs = ("img", "number", "index")
    got = epoch_of(folder, partial(brighter_or_not, strength=0.5), outputs=outputs)
    assert got["index"].tolist() == got["gt_label"].tolist() == list(range(len(folder)))
    numbers = uniforms(SEED, 0, np.arange(len(folder)), 2)
    assert got["number"].dtype == torch.float32
    # float32 keeps 24 bits of them
    np.testing.assert_allclose(got["number"].numpy(), numbers, rtol=0, atol=2**-24)
    for image, file, darker in zip(got["img"], folder.files, numbers[:, 0] < 0.5, strict=True):
        assert_like(image.permute(2, 0, 1), pillow(file, None, SIZE) * (0.5 if darker else 1.0))


@pipeline_def
def several_numbers():
    return sample_input("uniform", count=2), sample_input("window"), sample_input("uniform"), sample_input("uniform")


def test_each_call_gives_other_numbers(folder):
    outputs = ("a", "window", "b", "c")
    got = epoch_of(folder, several_numbers, outputs=outputs)
    numbers = uniforms(SEED, 0, np.arange(len(folder)), 4 + NUM_UNIFORMS)
    ours = torch.cat([got["a"], got["b"], got["c"]], dim=1).numpy()
    np.testing.assert_allclose(ours, numbers[:, [0, 1, -2, -1]], rtol=0, atol=2**-24)
    assert got["window"].dtype == torch.int32
    wanted = random_resized_crop(numbers[:, 2:-2], np.array(sizes_of(folder.files)))
    assert got["window"].tolist() == wanted.tolist()


def test_uniform_numbers_stay_below_one(monkeypatch):
    from fastrunner.data.dali import inputs

    monkeypatch.setattr(inputs, "uniforms", lambda seed, epoch, ids, n: np.full((len(ids), n), 1 - 2.0**-53))
    got = epoch_of(Arrays(np.zeros((3, 4, 4, 1), np.uint8)), only_numbers, outputs=("number",))
    assert got["number"].max() < 1


@pipeline_def
def only_numbers():
    return sample_input("uniform")


@pipeline_def
def undecoded():
    return fn.decoders.image(sample_input("encoded")), sample_input("file")


def test_samples_that_differ_in_shape_come_as_lists(folder):
    got = epoch_of(folder, undecoded, outputs=("img", "name"))
    for image, name, file in zip(got["img"], got["name"], folder.files, strict=False):
        assert image.shape == (*Image.open(file).size[::-1], 3)
        assert bytes(name.tolist()).rstrip(b"\0").decode() == file
    copies = [image.clone() for image in got["img"]]
    epoch_of(folder, undecoded, outputs=("img", "name"))
    assert all(torch.equal(image, copy) for image, copy in zip(got["img"], copies, strict=True))


def test_bytes_out_of_memory(folder):
    class InMemory:
        labels = folder.labels

        def __len__(self) -> int:
            return len(folder)

        def encoded(self, index: int) -> bytes:
            with open(folder.files[index], "rb") as file:
                return file.read()

    pipeline = ClassificationEval(SIZE)
    assert torch.equal(epoch_of(InMemory(), pipeline)["img"], epoch_of(folder, pipeline)["img"])
    train = ClassificationTrain(SIZE)
    assert torch.equal(epoch_of(InMemory(), train)["img"], epoch_of(folder, train)["img"])


def test_exif_orientation_counts(folder):
    """A portrait that is stored as a landscape: the crop is of the image as it is seen."""
    with Image.open(folder.files[0]) as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        image.save("turned.jpg", quality=95, exif=exif)
        image.transpose(Image.Transpose.ROTATE_270).save("upright.png")
    dataset = type(folder)(["turned.jpg", "upright.png"] * 4, torch.arange(8))
    images = epoch_of(dataset, windows_of_all, outputs=("img", "window"))["img"]
    assert [tuple(image.shape) for image in images[::2]] == [tuple(image.shape) for image in images[1::2]]


@pipeline_def
def windows_of_all():
    image = fn.decoders.image(sample_input("encoded"))
    return image, sample_input("window", scale=(1.0, 1.0), ratio=(0.01, 100.0))


# A GPU: complete, and run whenever there is one.


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["gpu", "mixed"])
@pytest.mark.parametrize("pipeline", [ClassificationTrain, ClassificationEval])
def test_gpu_like_cpu(folder, device, pipeline):
    wanted = epoch_of(folder, pipeline(SIZE, mean=[0.0] * 3, std=[1.0] * 3))
    got = epoch_of(folder, pipeline(SIZE, mean=[0.0] * 3, std=[1.0] * 3, device=device))
    assert got["img"].device.type == "cuda"
    assert got["gt_label"].tolist() == wanted["gt_label"].tolist()
    # nvJPEG's inverse transform and upsampling round differently: two levels on average at most
    assert (got["img"].cpu() - wanted["img"]).abs().mean() < 2


@pytest.mark.cuda
def test_gpu_batches_live_as_long_as_someone_holds_them(folder):
    loader = DaliLoader(folder, pipeline=ClassificationTrain(SIZE, device="gpu"), batch_size=4)
    held = [(batch["img"], batch["img"].clone()) for _ in range(3) for batch in loader]
    loader.close()
    assert all(torch.equal(image, copy) for image, copy in held)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_pipeline_without_a_gpu(folder):
    with pytest.raises(ValueError, match=r"needs a GPU, and torch\.cuda\.is_available\(\) is False"):
        DaliLoader(folder, pipeline=ClassificationTrain(SIZE, device="mixed"), batch_size=4)


def test_the_pipeline_of_the_docs(folder, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "dali.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def blurred" in block)
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        shutil.copy(folder.files[ord(label) - ord("a")], tmp_path / "photos" / label / "1.jpg")
    names: dict = {}
    exec(compile(code, "docs/dali.md", "exec"), names)
    (batch,) = build_dataloader(names["dataset"], 2, 1, shuffle=False, seed=0)
    assert batch["img"].shape == (2, 128, 128, 3)
    assert batch["index"].tolist() == batch["gt_label"].tolist() == [0, 1]
