"""Real data without a download: scikit-learn's digits, and JPEG crops of the photographs that libraries ship.

``Digits`` fits in memory. ``Photos`` is a folder of JPEG files, made once, so that reading, decoding and augmenting
cost what they cost in real training. Both are split so that validation measures something: digits by sample,
photographs by region (no pixel of a photograph is in both splits).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..registry import DATASETS
from .crops import NUM_UNIFORMS, random_resized_crop
from .images import accuracy, make_dali_loader

SPLITS = ("train", "val")
_EXTRA = "pip install fastrunner[bench]"


def _check_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split


@DATASETS.register_module()
class Digits(Dataset[dict[str, Tensor]]):
    """scikit-learn's 1,797 handwritten digits (the test part of UCI's optdigits), 8 x 8 pixels, 10 classes.

    Within each class, in scikit-learn's order, every fifth image is for validation: 1,442 to train, 355 to validate.

    Args:
        split: "train" or "val".
    Attributes:
        images: uint8, (N, 1, 8, 8); scikit-learn's 0..16 as 0..255.
        labels: int64, (N,).
    """

    CLASSES = tuple("0123456789")

    def __init__(self, split: str = "train") -> None:
        self.split = _check_split(split)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(f"Digits come with scikit-learn, which is not installed: {_EXTRA}") from error
        images, labels = load_digits(return_X_y=True)
        rank_in_class = np.empty(len(labels), dtype=np.int64)
        for label in range(len(self.CLASSES)):
            members = np.flatnonzero(labels == label)
            rank_in_class[members] = np.arange(len(members))
        chosen = (rank_in_class % 5 == 4) == (split == "val")
        scaled = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)
        self.images = torch.from_numpy(scaled.reshape(-1, 1, 8, 8))
        self.labels = torch.from_numpy(labels[chosen].astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """dict(img=uint8 (1, 8, 8), gt_label=int64 ())."""
        return {"img": self.images[index], "gt_label": self.labels[index]}

    def evaluate(self, results: Sequence[Tensor], logger: Any = None) -> dict[str, float]:
        """Scores of each class for each sample, in order -> dict(acc=share of the samples that are right)."""
        return accuracy(results, self.labels)


@DATASETS.register_module()
class Photos(Dataset[dict[str, Tensor]]):
    """JPEG crops of ten real photographs, one class a photograph: 3,200 to train, 500 to validate.

    The left 60 % of each photograph's columns give the training crops, the rest the validation crops. A crop is a
    square of 25 to 40 % of the photograph's shorter side (75 to 564 pixels), kept at 128 x 128, quality 90: 5.6 kB. The
    files are made once (some 5 s) in the cache folder: ``FASTRUNNER_CACHE``, else ``$XDG_CACHE_HOME/fastrunner``,
    else ``~/.cache/fastrunner``.

    Args:
        split: "train" or "val".
        size: height and width of the images that come out.
        root: the cache folder, instead of the one above.
    Attributes:
        files: paths, in the manifest's order.
        labels: int64, (N,).
    Raises:
        ValueError: unknown split, or a size that is not positive.
        ImportError: scikit-image, scikit-learn or Pillow is missing.
        OSError: the cache folder cannot be written.
    """

    CLASSES = (
        "astronaut", "cat", "china", "coffee", "flower", "galaxies", "motorcycle", "retina", "rocket", "tissue",
    )  # fmt: skip

    SCALE = (0.35, 1.0)  # area of a training crop, as a share of the image's

    def __init__(self, split: str = "train", *, size: int = 64, root: str | os.PathLike[str] | None = None) -> None:
        self.split = _check_split(split)
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self.size = size
        folder = make_photos(Path(root) if root is not None else cache_dir())
        manifest = json.loads((folder / "manifest.json").read_text())
        entries = [(str(folder / name), label) for name, label in manifest[split]]
        self.files = [name for name, _ in entries]
        self.labels = torch.tensor([label for _, label in entries], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """dict(img=uint8 (3, size, size), gt_label=int64 ()). Pillow decodes; crop and mirror use torch's generator."""
        from PIL import Image

        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        box, mirror = None, False
        if self.split == "train":
            uniform = torch.rand(1, NUM_UNIFORMS + 1, dtype=torch.float64).numpy()
            sizes = np.array([[image.height, image.width]])
            top, left, height, width = random_resized_crop(uniform[:, 1:], sizes, scale=self.SCALE)[0].tolist()
            box = (left, top, left + width, top + height)
            mirror = uniform[0, 0] < 0.5
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        pixels = pixels[:, ::-1] if mirror else pixels
        return {
            "img": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "gt_label": self.labels[index],
        }

    def evaluate(self, results: Sequence[Tensor], logger: Any = None) -> dict[str, float]:
        """Scores of each class for each sample, in order -> dict(acc=share of the samples that are right)."""
        return accuracy(results, self.labels)

    @property
    def pipeline(self) -> dict[str, Any]:
        """Random crops and mirroring for training, whole images for validation."""
        if self.split == "train":
            return {"type": "ClassificationTrain", "size": self.size, "scale": self.SCALE}
        return {"type": "ClassificationEval", "size": self.size, "resize": self.size}

    def make_loader(self, *, batch_size: int, num_workers: int = 2, **kwargs: Any) -> Any:
        """A :class:`~fastrunner.data.dali.DaliLoader`; see :func:`~fastrunner.data.images.make_dali_loader`."""
        return make_dali_loader(self, self.pipeline, batch_size=batch_size, num_workers=num_workers, **kwargs)


# How the photographs become files. Whoever changes any of it changes the version, and everybody's cache is made anew.
_VERSION = "photos-v1"
_SEED = 20240917
_PIXELS, _QUALITY = 128, 90
_CROPS = {"train": 320, "val": 50}  # a photograph
_TRAIN_COLUMNS = 0.6
_SIDE = (0.25, 0.4)  # of the photograph's shorter side


def cache_dir() -> Path:
    """Where made data is kept; not created here."""
    own = os.environ.get("FASTRUNNER_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrunner"


def make_photos(cache: Path) -> Path:
    """The folder with the JPEG files and ``manifest.json`` (split -> [[file, label], ...]), made where it is missing.

    Whole or not at all: it is made under another name and renamed. Of several makers at once the first one wins.
    """
    folder = cache / _VERSION
    if (folder / "manifest.json").exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{_VERSION}.", dir=cache))
    except OSError as error:
        raise OSError(f"cannot write the cache folder {cache}: {error}; name another in FASTRUNNER_CACHE") from error
    try:
        _write_photos(work)
        work.chmod(0o755)  # mkdtemp's folders are private
        try:
            work.rename(folder)
        except OSError as error:
            if not (folder / "manifest.json").exists():  # otherwise another maker was faster
                raise OSError(f"{folder} is in the way, and has no manifest.json: remove it") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already where the rename worked
    return folder


def _write_photos(folder: Path) -> None:
    from PIL import Image

    photographs = _photographs()
    manifest: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for label, name in enumerate(Photos.CLASSES):
        photograph = Image.fromarray(photographs[name]())
        for split in SPLITS:
            (folder / split / name).mkdir(parents=True)
            for number, box in enumerate(_boxes(photograph.width, photograph.height, split, label)):
                file = f"{split}/{name}/{number:03d}.jpg"
                crop = photograph.crop(box)  # before the resize, whose filter would look beyond a box=
                crop.resize((_PIXELS, _PIXELS), Image.Resampling.LANCZOS).save(folder / file, quality=_QUALITY)
                manifest[split].append((file, label))
    (folder / "manifest.json").write_text(json.dumps({"version": _VERSION, "classes": Photos.CLASSES, **manifest}))


def _boxes(width: int, height: int, split: str, label: int) -> list[tuple[int, int, int, int]]:
    """Where the crops of one photograph are: (left, top, right, bottom) in pixels."""
    border = int(width * _TRAIN_COLUMNS)
    left, right = (0, border) if split == "train" else (border, width)
    random = np.random.default_rng([_SEED, label, SPLITS.index(split)])
    boxes = []
    for _ in range(_CROPS[split]):
        side = round(min(width, height) * random.uniform(*_SIDE))
        x, y = int(random.integers(left, right - side + 1)), int(random.integers(0, height - side + 1))
        boxes.append((x, y, x + side, y + side))
    return boxes


def _photographs() -> dict[str, Callable[[], NDArray[np.uint8]]]:
    """Class name -> reader of the colour photograph. Only files that are inside the wheels: nothing is fetched."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image

        skimage_data: Any = skimage.data  # partly typed
    except ImportError as error:
        raise ImportError(
            f"Photos are made from scikit-image's and scikit-learn's photographs; one is missing: {_EXTRA}"
        ) from error
    return {
        "astronaut": skimage_data.astronaut,
        "cat": skimage_data.chelsea,
        "china": lambda: load_sample_image("china.jpg"),
        "coffee": skimage_data.coffee,
        "flower": lambda: load_sample_image("flower.jpg"),
        "galaxies": skimage_data.hubble_deep_field,
        "motorcycle": lambda: skimage_data.stereo_motorcycle()[0],
        "retina": skimage_data.retina,
        "rocket": skimage_data.rocket,
        "tissue": skimage_data.immunohistochemistry,
    }
