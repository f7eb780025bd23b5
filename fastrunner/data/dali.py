"""JPEG files through a DALI pipeline on the CPU: read, decode, crop and resize in DALI's threads, ahead of the step.

DALI decides nothing here. Which files make a batch, and where each is cropped, is worked out in numpy as a pure
function of (seed, epoch, index) and fed to the pipeline:

    order = epoch_indices(seed, epoch)            crop, mirror of sample i = f(hash(seed, epoch, i))

So a seek is an assignment, a resumed run sees the bytes of the uninterrupted one, and the number of threads changes
nothing. The order never ends: while the last batch of an epoch is used, the first ones of the next are being decoded.

Found by measuring (128 x 128 JPEG of 5.6 kB -> 64 x 64, one thread): reading 36 us an image, decoding 72, resizing 80,
mirror and layout 25. Feeding the bytes from memory instead of file names saves DALI the reading, but costs the main
thread one Python object an image; names travel as one array.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .order import epoch_indices
from .rng import uniforms

SCALE = (0.35, 1.0)  # area of a random crop, as a share of the image's
RATIO = (3 / 4, 4 / 3)  # width over height of a random crop, in units of the image's own


class ImageFiles(Protocol):
    """A data set whose samples are files: ``files[i]`` is a path, ``labels[i]`` its class (int64)."""

    @property
    def files(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Tensor: ...
    def __len__(self) -> int: ...


def crop_and_mirror(
    uniform: NDArray[np.float64], *, scale: tuple[float, float] = SCALE, ratio: tuple[float, float] = RATIO
) -> NDArray[np.float32]:
    """Random crops from uniform numbers: area uniform in ``scale``, aspect log-uniform in ``ratio``, place uniform.

    Args:
        uniform: float64 in [0, 1), (n, 5).
    Returns:
        float32, (n, 5): left, top, width, height as shares of the image, and 1 to mirror or 0.
    """
    area = scale[0] + (scale[1] - scale[0]) * uniform[:, 0]
    aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * uniform[:, 1])
    width = np.minimum(np.sqrt(area * aspect), 1.0)
    height = np.minimum(np.sqrt(area / aspect), 1.0)
    left, top = uniform[:, 2] * (1 - width), uniform[:, 3] * (1 - height)
    return np.stack([left, top, width, height, uniform[:, 4] < 0.5], axis=1).astype(np.float32)


@dataclass(slots=True)
class _InFlight:
    """A batch that DALI is working on."""

    epoch: int
    position: int
    indices: NDArray[np.int64]
    labels: Tensor


@dataclass(slots=True)
class _Block:
    """The pipeline's inputs for ``_BLOCK`` batches of an epoch, the last of them perhaps fewer."""

    epoch: int
    number: int
    indices: NDArray[np.int64]
    labels: Tensor
    inputs: dict[str, NDArray[Any]]


# Batches whose names and crops are worked out together: numpy costs 0.2 ms a batch, but hardly more for 16 of them.
_BLOCK = 16


class DaliLoader:
    """Batches of an image folder, decoded by DALI on the CPU: dict(img=uint8 (N, 3, H, W), gt_label=int64 (N,)).

    Each ``iter()`` is the next epoch, or where ``seek`` has pointed; one iterator is valid at a time. Images are DALI's
    own memory, handed over without a copy: DALI takes it back when the tensor is gone, not before.

    Args:
        dataset: see :class:`ImageFiles`.
        batch_size: samples a batch on this rank; the last of an epoch may be smaller.
        size: (height, width) of the images that come out.
        augment: a random crop, resized to ``size``, mirrored half of the time; otherwise the whole image is resized.
        num_threads: DALI's threads.
        shuffle, seed, rank, world_size: of the order, see :func:`fastrunner.data.order.epoch_indices`.
        drop_last: leave out the last, incomplete batch of each epoch.
        prefetch: batches that are being made ahead.
    Attributes:
        samples_fed: images that DALI was asked to decode since the loader was made.
    Raises:
        ImportError: DALI is not installed.
        ValueError: an empty data set, or a count that is not positive.
        RuntimeError: from the iterator: a file could not be read or decoded; the message names it.
    Cost on the main thread: a few calls into DALI and some small arrays a batch, whatever the size of the images.
    """

    def __init__(
        self,
        dataset: ImageFiles,
        *,
        batch_size: int,
        size: tuple[int, int],
        augment: bool = False,
        num_threads: int = 2,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> None:
        _import_dali()
        if len(dataset) == 0:
            raise ValueError(f"{type(dataset).__name__} has no files")
        for name, count in (("batch_size", batch_size), ("num_threads", num_threads), ("prefetch", prefetch)):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        self.dataset, self.batch_size, self.size, self.augment = dataset, batch_size, size, augment
        self.num_threads, self.prefetch = num_threads, prefetch
        self.shuffle, self.rank, self.world_size, self.drop_last = shuffle, rank, world_size, drop_last
        self.samples_fed = 0
        self._seed = seed
        self._start = (0, 0)  # epoch and position that the next iter() begins at
        self._iterator = 0  # number of the iterator that is valid
        self._pipe: Any = None
        self._queue: deque[_InFlight] = deque()
        self._feeding = (0, 0)  # epoch and position of the batch to be fed next
        self._order: tuple[int, NDArray[np.int64]] | None = None  # (epoch, its order) that was fed last
        self._block: _Block | None = None  # that was fed last

    def __len__(self) -> int:
        """Batches an epoch on this rank."""
        samples = -(-len(self.dataset) // self.world_size)
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    @property
    def seed(self) -> int:
        """Seed of order and augmentation. Setting it drops what was made ahead."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        if seed != self._seed:
            self._seed, self._order, self._block = seed, None, None
            self._iterator += 1
            self._drain()

    def seek(self, epoch: int, position: int = 0) -> None:
        """Let the next ``iter()`` start at batch ``position`` of ``epoch``: O(1), and nothing skipped is decoded.

        Raises:
            ValueError: no such batch. ``position == len(self)`` is the end of the epoch.
        """
        if epoch < 0 or not 0 <= position <= len(self):
            raise ValueError(f"no batch {position} in epoch {epoch}: an epoch has {len(self)} batches")
        self._start = (epoch, position)
        self._iterator += 1

    def close(self) -> None:
        """End DALI's threads and free its memory. Iterating again starts new ones."""
        self._iterator += 1
        self._queue.clear()
        self._pipe = None  # a pipeline ends with its last reference

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, position = self._start
        self._start = (epoch + 1, 0)
        self._iterator += 1
        if position < len(self):
            # A whole-image, in-order epoch is like any other: what was made ahead of one serves the next that is asked.
            self._aim(epoch if self.shuffle or self.augment else 0, position)
        return self._batches(len(self) - position, self._iterator)

    def _batches(self, count: int, iterator: int) -> Iterator[dict[str, Tensor]]:
        for _ in range(count):
            if iterator != self._iterator:
                raise RuntimeError(
                    "this iterator of a DaliLoader is no longer valid: iter(), seek() or close() was called after it"
                )
            yield self._take()

    def _aim(self, epoch: int, position: int) -> None:
        """Make a batch the next to come out, and have ``prefetch`` batches made from there on."""
        if self._queue and (self._queue[0].epoch, self._queue[0].position) != (epoch, position):
            self._drain()
        if not self._queue:
            self._feeding = (epoch, position)
        if self._pipe is None:
            self._pipe = self._build(self.batch_size, self.num_threads, self.prefetch)
            for _ in range(self.prefetch):
                self._feed()
            self._pipe.schedule_run()  # the first call starts as many runs as the queue is deep
        while len(self._queue) < self.prefetch:
            self._feed()
            self._pipe.schedule_run()

    def _take(self) -> dict[str, Tensor]:
        """The next batch, once it is made; another one is begun in its place."""
        batch = self._queue.popleft()
        try:
            images = self._pipe.share_outputs()[0]
        except RuntimeError as error:
            suspects = [batch, *self._queue]
            self.close()  # a pipeline that has failed cannot go on
            raise RuntimeError(self._blame(suspects)) from error
        img = from_dlpack(images.as_tensor().__dlpack__())  # 5 us; with the tensor itself 130
        self._pipe.release_outputs()
        self._feed()
        self._pipe.schedule_run()
        return {"img": img, "gt_label": batch.labels}

    def _feed(self) -> None:
        """Give the pipeline its next batch to make."""
        epoch, position = self._feeding
        self._feeding = (epoch, position + 1) if position + 1 < len(self) else (self._epoch_after(epoch), 0)
        block, first = divmod(position, _BLOCK)
        if self._block is None or (self._block.epoch, self._block.number) != (epoch, block):
            self._block = self._make_block(epoch, block)
        rows = slice(first * self.batch_size, (first + 1) * self.batch_size)
        batch = _InFlight(epoch, position, self._block.indices[rows], self._block.labels[rows])
        for name, array in self._block.inputs.items():
            self._pipe.feed_input(name, array[rows])
        self._queue.append(batch)
        self.samples_fed += len(batch.indices)

    def _make_block(self, epoch: int, number: int) -> _Block:
        if self._order is None or self._order[0] != epoch:
            order = epoch_indices(
                len(self.dataset),
                seed=self.seed,
                epoch=epoch,
                rank=self.rank,
                world_size=self.world_size,
                shuffle=self.shuffle,
            )
            self._order = (epoch, order)
        samples = _BLOCK * self.batch_size
        indices = self._order[1][number * samples : (number + 1) * samples]
        labels = self.dataset.labels[torch.from_numpy(indices)]
        return _Block(epoch, number, indices, labels, self._inputs(epoch, indices))

    def _epoch_after(self, epoch: int) -> int:
        return epoch + 1 if self.shuffle or self.augment else epoch

    def _inputs(self, epoch: int, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What the pipeline gets for some samples: one row each."""
        files = self.dataset.files
        # One array for all names, padded with zeros: DALI reads a name up to its first zero byte.
        names = np.array([os.fsencode(files[index]) for index in indices.tolist()])
        inputs: dict[str, NDArray[Any]] = {"names": names.view(np.uint8).reshape(len(names), -1)}
        if self.augment:
            inputs["crops"] = crop_and_mirror(uniforms(self.seed, epoch, indices, 5))
        return inputs

    def _drain(self) -> None:
        """Drop the batches that were made ahead."""
        try:
            while self._queue:
                self._queue.popleft()
                self._pipe.share_outputs()
                self._pipe.release_outputs()
        except RuntimeError:  # a broken file in a batch that nobody will see; it is named when its turn comes
            self._queue.clear()
            self._pipe = None

    def _build(self, batch_size: int, num_threads: int, prefetch: int) -> Any:
        """The pipeline: names (and crops) in, uint8 (N, 3, H, W) out."""
        Pipeline, fn, types = _import_dali()
        pipe = Pipeline(batch_size=batch_size, num_threads=num_threads, device_id=None, prefetch_queue_depth=prefetch)
        with pipe:
            encoded = fn.io.file.read(fn.external_source(name="names", ndim=1, dtype=types.UINT8))
            mirror: Any = 0
            if self.augment:
                crops = fn.external_source(name="crops", ndim=1, dtype=types.FLOAT)
                image = fn.decoders.image_slice(
                    encoded, crops[0:2], crops[2:4], normalized_anchor=True, normalized_shape=True, axis_names="WH"
                )
                mirror = fn.cast(crops[4], dtype=types.INT32)
            else:
                image = fn.decoders.image(encoded)
            image = fn.resize(image, size=self.size)
            pipe.set_outputs(
                fn.crop_mirror_normalize(
                    image, dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0], mirror=mirror
                )
            )
        pipe.build()
        return pipe

    def _blame(self, suspects: Sequence[_InFlight]) -> str:
        """What to say about a failed pipeline: the file that fails when it is alone. Reads the suspects once more."""
        pipe = self._build(1, 1, 1)
        for batch in suspects:
            for index in batch.indices:
                try:
                    for name, array in self._inputs(batch.epoch, np.array([index])).items():
                        pipe.feed_input(name, array)
                    pipe.schedule_run()
                    pipe.share_outputs()
                    pipe.release_outputs()
                except RuntimeError as error:
                    file = self.dataset.files[index]
                    return f"cannot read {file} (sample {index}): {_reason(file, error)}; remove or replace it"
        files = sum(len(batch.indices) for batch in suspects)
        return f"DALI's pipeline failed, though each of the {files} files it worked on can be read alone"


def _reason(file: str, error: RuntimeError) -> str:
    """What is wrong with ``file``: of DALI's message only the line that says what, not where in the pipeline."""
    if not os.path.exists(file):
        return "no such file"
    if os.path.getsize(file) == 0:
        return "the file is empty"
    lines = [line.strip() for line in str(error).splitlines()]
    after = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else lines
    return next((line for line in after if line), "unknown to DALI")


def _import_dali() -> tuple[Any, Any, Any]:
    """DALI's Pipeline, fn and types; imported when the first loader is made (0.9 s), not with fastrunner."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise ImportError("reading images by DALI needs nvidia-dali: pip install fastrunner[dali]") from error
    return Pipeline, fn, types
