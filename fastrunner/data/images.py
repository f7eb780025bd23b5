"""Data sets of images for :class:`~fastrunner.data.dali.DaliLoader`: folders, lists of files, arrays.

build_dataloader(dict(type="ImageFolder", root="train", pipeline=dict(type="ClassificationTrain", size=224)), 64, 4)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..registry import DATASETS

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp", ".jp2")
Pipeline = Callable[..., Any] | Mapping[str, Any] | str


def make_dali_loader(dataset: Any, pipeline: Pipeline, *, batch_size: int, num_workers: int = 2, **kwargs: Any) -> Any:
    """A DaliLoader as ``build_dataloader`` asks for it: ``num_workers`` are DALI's threads, at least one."""
    from .dali import DaliLoader

    return DaliLoader(dataset, pipeline=pipeline, batch_size=batch_size, num_threads=max(1, num_workers), **kwargs)


def accuracy(results: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """``dict(acc=...)`` of scores (classes,) for each sample.

    Raises:
        ValueError: not as many results as labels.
    """
    if len(results) != len(labels):
        raise ValueError(f"{len(results)} results for {len(labels)} samples; evaluate the whole data set, in its order")
    predicted = torch.stack([result.cpu() for result in results]).argmax(1)
    return {"acc": (predicted == labels).double().mean().item()}


class DaliImages:
    """What the data sets below have in common: ``build_dataloader`` makes a DaliLoader of them.

    Args:
        pipeline: see :class:`~fastrunner.data.dali.DaliLoader`.
        **options: for the DaliLoader: ``outputs``, ``unreadable``, ``prefetch``, ``device_id``.
    """

    labels: Tensor

    def __init__(self, pipeline: Pipeline, **options: Any) -> None:
        self.pipeline, self.options = pipeline, options

    def make_loader(self, *, batch_size: int, num_workers: int = 2, **kwargs: Any) -> Any:
        """A DaliLoader; see :func:`make_dali_loader`."""
        options = {**self.options, **kwargs}
        return make_dali_loader(self, self.pipeline, batch_size=batch_size, num_workers=num_workers, **options)

    def evaluate(self, results: Sequence[Tensor], logger: Any = None) -> dict[str, float]:
        """Scores of each class for each sample, in order -> dict(acc=share of the samples that are right)."""
        return accuracy(results, self.labels)


@DATASETS.register_module()
class ImageFolder(DaliImages):
    """``root/<class>/**/<image>``, as torchvision's: classes are the folders, sorted; files are sorted in each of them.

    Args:
        root: the folder.
        extensions: of files that count, in small letters.
        pipeline, **options: see :class:`DaliImages`.
    Attributes:
        CLASSES: names of the folders.
        files, labels: paths, and int64, (N,).
    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has no class folders, or one of them has no images.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        pipeline: Pipeline = "ClassificationTrain",
        *,
        extensions: Sequence[str] = EXTENSIONS,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, **options)
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder.absolute()}")
        self.CLASSES = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
        if not self.CLASSES:
            raise ValueError(
                f"{folder.absolute()} has no folders: one for each class is expected, with the images in it"
            )
        self.files: list[str] = []
        counts = []
        for name in self.CLASSES:
            found = _images_in(folder / name, tuple(extensions))
            if not found:
                raise ValueError(f"{(folder / name).absolute()} has no images ({', '.join(extensions)})")
            self.files += found
            counts.append(len(found))
        self.labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def __len__(self) -> int:
        return len(self.files)


def _images_in(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    """All images in a folder and below, sorted."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        found += [os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(extensions)]
    return found


@DATASETS.register_module()
class ImageList(DaliImages):
    """Files with labels: (path, label) pairs, or a text file with a path, a blank and a label in each line.

    Args:
        entries: the pairs, or the text file's path.
        root: what relative paths start from; default: the text file's folder, else the current one.
        pipeline, **options: see :class:`DaliImages`.
    Attributes:
        files, labels: paths, and int64, (N,).
    Raises:
        FileNotFoundError: no such text file.
        ValueError: a line without a label, or no lines.
    """

    def __init__(
        self,
        entries: str | os.PathLike[str] | Sequence[tuple[str, int]],
        pipeline: Pipeline = "ClassificationTrain",
        *,
        root: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, **options)
        if isinstance(entries, (str, os.PathLike)):
            root = Path(entries).parent if root is None else root
            entries = _read_list(Path(entries))
        if not entries:
            raise ValueError("the list of images is empty")
        self.files = [os.path.join(root, file) if root is not None else os.fspath(file) for file, _ in entries]
        self.labels = torch.tensor([int(label) for _, label in entries], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.files)


def _read_list(file: Path) -> list[tuple[str, int]]:
    entries = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.lstrip("-").isdigit():
            raise ValueError(f"{file}, line {number}: a path, a blank and a whole number are expected, got {line!r}")
        entries.append((path.rstrip(), int(label)))
    if not entries:
        raise ValueError(f"{file} lists no images")
    return entries


@DATASETS.register_module()
class ImageArray(DaliImages):
    """Decoded images in memory, or memory-mapped: some ten times as fast as JPEG files of the same size.

    Args:
        images: uint8, (N, H, W, C), or the path of a ``.npy`` file, which is mapped, not read.
        labels: integers, (N,), or the path of a ``.npy`` file; None: batches have no ``gt_label``.
        pipeline, **options: see :class:`DaliImages`.
    Raises:
        FileNotFoundError: no such file.
        TypeError: images or labels of another type or shape.
        ValueError: no images, or another number of labels.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | str | os.PathLike[str],
        labels: NDArray[np.integer[Any]] | Tensor | Sequence[int] | str | os.PathLike[str] | None = None,
        pipeline: Pipeline = "ClassificationTrain",
        **options: Any,
    ) -> None:
        super().__init__(pipeline, **options)
        self.images: NDArray[np.uint8] = _array(images)
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise TypeError(f"images must be uint8, (N, H, W, C), got {self.images.dtype}, {self.images.shape}")
        if len(self.images) == 0:
            raise ValueError("there are no images")
        if labels is None:
            return
        numbers = _array(labels)
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise TypeError(f"labels must be integers, (N,), got {numbers.dtype}, {numbers.shape}")
        if len(numbers) != len(self.images):
            raise ValueError(f"there are {len(self.images)} images, but {len(numbers)} labels")
        self.labels = torch.from_numpy(numbers.astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)


def _array(value: Any) -> Any:
    """The array itself, or the ``.npy`` file at a path, mapped."""
    return np.load(value, mmap_mode="r") if isinstance(value, (str, os.PathLike)) else np.asarray(value)
