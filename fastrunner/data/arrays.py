"""Data sets in arrays, in memory or mapped from ``.npy`` files: threads gather and augment whole batches into slots.

    dict(
        type="ArrayDataset",
        arrays=dict(img="train_images.npy", gt_label="train_labels.npy"),
        operations=[
            dict(type="RandomCrop", size=32, padding=4),
            dict(type="RandomFlip"),
            dict(type="Normalize", mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]),
            dict(type="Layout", order="CHW"),
        ],
    )

A batch is ``dict(img=..., gt_label=...)``: for each array its rows, those of ``key`` through the operations
(``operations.py``), which are compiled to one pass over the output (``fuse.py``). What is random about a sample follows
from (seed, epoch, sample id), so threads change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..registry import DATASETS, OPERATIONS, build_from_cfg
from .fuse import Fused, fuse
from .loader import EpochLoader
from .operations import Operation
from .order import BatchOrder
from .ring import Memory, Ring, allocate
from .rng import key_of

Source = str | os.PathLike[str] | NDArray[Any] | Tensor


@DATASETS.register_module()
class ArrayDataset(Dataset[dict[str, Tensor]]):
    """Arrays whose first dimension counts samples.

    Args:
        arrays: name -> array, tensor, or path of an ``.npy`` file, which is mapped, not read.
        operations: dicts that OPERATIONS builds, or objects; None: rows as they are.
        key: which array they are for; None: the first.
        layout: how its images lie: ``"HWC"`` or ``"CHW"``.
        **attributes: kept on the data set, e.g. ``CLASSES``.
    Attributes:
        arrays: name -> numpy array.
    Raises:
        FileNotFoundError: no such file.
        TypeError: an array that is none, or of objects.
        ValueError: no arrays, different lengths, no samples, or operations that do not fit.
        ImportError: there are operations, and numba is not installed.
    """

    def __init__(
        self,
        arrays: Mapping[str, Source],
        operations: Sequence[Mapping[str, Any] | Operation] | None = None,
        *,
        key: str | None = None,
        layout: str = "HWC",
        **attributes: Any,
    ) -> None:
        self.arrays = {name: _open(name, source) for name, source in arrays.items()}
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"arrays must have equally many samples, got {lengths}" if lengths else "no arrays were given"
            )
        if not next(iter(lengths.values())):
            raise ValueError(f"the arrays {', '.join(lengths)} have no samples")
        self.key = next(iter(self.arrays)) if key is None else key
        if self.key not in self.arrays:
            raise ValueError(f"key {self.key!r} is none of the arrays {', '.join(self.arrays)}")
        self.operations = [
            operation if isinstance(operation, Operation) else build_from_cfg(dict(operation), OPERATIONS)
            for operation in operations or ()
        ]
        self.fused: Fused | None = None
        if self.operations:
            self.fused = fuse(self.operations, self.arrays[self.key], layout)
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.arrays[self.key])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample as epoch 0 of seed 0 gives it."""
        ids = np.arange(len(self), dtype=np.int64)[index : index + 1 or None]
        if len(ids) == 0:
            raise IndexError(f"no sample {index}: there are {len(self)}")
        memory = allocate(self.shapes(1))
        return {name: tensor[0] for name, tensor in self.fill(memory, (ids, key_of(0, 0))).items()}

    def shapes(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """name -> (shape, dtype) of a batch."""
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((batch_size, *array.shape[1:]), array.dtype) for name, array in self.arrays.items()
        }
        if self.fused is not None:
            shapes[self.key] = ((batch_size, *self.fused.shape), self.fused.dtype)
        return shapes

    def fill(self, memory: Memory, job: Job) -> dict[str, Tensor]:
        """Write a batch into ``memory``; its tensors are views of that. Nearly all of it outside the GIL."""
        ids, key = job
        batch = {}
        for name, array in self.arrays.items():
            out = memory[name][: len(ids)]
            if name == self.key and self.fused is not None:
                self.fused(array, ids, key, out)
            elif array.flags.c_contiguous:
                np.take(array, ids, axis=0, out=out, mode="clip")  # "raise" would go through a buffer
            else:
                out[:] = array[ids]  # take would make all of the array contiguous first
            batch[name] = torch.from_numpy(out)
        return batch

    def make_loader(self, *, batch_size: int, num_workers: int = 1, **options: Any) -> ArrayLoader:
        """An :class:`ArrayLoader`; ``num_workers`` are threads."""
        return ArrayLoader(self, batch_size=batch_size, num_threads=num_workers, **options)


def _open(name: str, source: Source) -> NDArray[Any]:
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"array {name!r}: no such file: {os.fspath(source)}")
        try:
            array = np.load(source, mmap_mode="r")
        except ValueError as error:
            raise ValueError(
                f"array {name!r}: {os.fspath(source)} is no .npy file that can be mapped: {error}"
            ) from error
    elif isinstance(source, Tensor):
        array = source.detach().cpu().numpy()
    else:
        array = source
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        kind = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(
            f"array {name!r} must be an array or tensor of numbers, or the path of an .npy file; got {kind}"
        )
    if array.ndim == 0:
        raise ValueError(f"array {name!r} must have a first dimension that counts samples")
    return np.asarray(array)  # numba and torch know no memmap


Job = tuple[NDArray[np.int64], NDArray[np.uint64]]  # ids of a batch's samples, the epoch's key


def _jobs(order: BatchOrder, places: Iterable[tuple[int, int]]) -> Iterator[Job]:
    """What there is to know of a batch before there is a slot for it. The loader may be dropped while threads run."""
    current, key = -1, key_of(order.seed, 0)
    for epoch, position in places:
        if epoch != current:
            current, key = epoch, key_of(order.seed, epoch)
        yield order.ids(epoch, position), key


class ArrayLoader(EpochLoader):
    """Batches of an :class:`ArrayDataset`, made by threads in slots (see ``ring``).

    Args:
        num_threads: 0: batches are made by who asks for them, none ahead.
        shuffle, seed, rank, world_size, drop_last: see :class:`~fastrunner.data.order.BatchOrder`.
        prefetch: batches that may lie ready.
        pin_memory: page-locked slots; None: where there is a GPU.
    """

    def __init__(
        self,
        dataset: ArrayDataset,
        *,
        batch_size: int,
        num_threads: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        prefetch: int = 2,
        pin_memory: bool | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.num_threads = dataset, batch_size, num_threads
        self.order = BatchOrder(
            len(dataset),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        pinned = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._ring: Ring | None = None
        if num_threads > 0:
            shapes = dataset.shapes(batch_size)
            make_memory = _Allocate(shapes, pinned)
            self._ring = Ring(make_memory, dataset.fill, num_threads=num_threads, ahead=prefetch, pinned=pinned)

    def _start(self, epoch: int, position: int) -> None:
        if self._ring is not None and not self._goes_on(epoch, position):
            self._ring.start(_jobs(self.order, self._places(epoch, position)))

    def _next(self) -> dict[str, Tensor]:
        if self._ring is None:
            memory = allocate(self.dataset.shapes(self.batch_size))
            return self.dataset.fill(memory, next(_jobs(self.order, [(self.epoch, self.position)])))
        batch: dict[str, Tensor] = self._ring.take()
        self._advance()
        return batch

    def _stop(self) -> None:
        if self._ring is not None:
            self._ring.close()

    def stats(self) -> dict[str, float]:
        """How well the threads kept up: see :class:`~fastrunner.data.ring.Stats`."""
        return asdict(self._ring.stats) if self._ring is not None else {}

    @property
    def num_ready(self) -> int | None:
        """Batches that can be taken without waiting; None without threads."""
        return self._ring.num_ready if self._ring is not None else None


class _Allocate:
    """Memory of one slot."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], Any]], pinned: bool) -> None:
        self.shapes, self.pinned = shapes, pinned

    def __call__(self) -> Memory:
        return allocate(self.shapes, pinned=self.pinned)
