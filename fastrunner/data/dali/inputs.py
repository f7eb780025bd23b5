"""How the order of samples reaches a DALI pipeline: inputs that the loader feeds, a batch ahead of every run.

A pipeline says what it wants to know about each sample, and gets it for whichever samples are next:

    @pipeline_def
    def mine():
        image = fn.decoders.image(sample_input("encoded"))
        noise = sample_input("uniform", count=3)
        ...

So DALI decides nothing: no reader, no shuffling, no random numbers of its own. What a sample becomes is a function of
(seed, epoch, index), a seek is an assignment, and neither threads, batches nor a resume change anything.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..crops import NUM_UNIFORMS, RATIO, SCALE, check_crop, random_resized_crop
from ..rng import uniforms
from .runtime import import_dali

KINDS = ("index", "label", "file", "encoded", "array", "uniform", "window")
Ids = NDArray[np.int64]
Make = Callable[[int, Ids], Any]  # (epoch, ids) -> one row each

_declaring: ContextVar[Inputs | None] = ContextVar("the inputs of the pipeline that is being built", default=None)


def sample_input(
    kind: str, *, count: int = 1, scale: tuple[float, float] = SCALE, ratio: tuple[float, float] = RATIO
) -> Any:
    """What the loader knows about each sample, as a node of the pipeline that is being built.

    Args:
        kind:
            ``"index"``: the sample's id in the data set; int64, ().
            ``"label"``: its class, ``dataset.labels[index]``; int64, ().
            ``"file"``: its path, ``dataset.files[index]``; uint8, (length,), as ``fn.io.file.read`` wants it.
            ``"encoded"``: the bytes of its file, or ``dataset.encoded(index)``; uint8, (length,).
            ``"array"``: its pixels, ``dataset.images[index]``; uint8, (H, W, C).
            ``"uniform"``: ``count`` numbers in [0, 1), other ones at each call; float32, (count,).
            ``"window"``: a random crop; int32, (4,): top, left, height, width in pixels, always inside the image. For
            ``fn.decoders.image_slice(encoded, start=w[0:2], shape=w[2:4], axes=[0, 1])``: with a window that is not
            inside DALI 2.4 may end the process.
        scale, ratio: of a window, see :mod:`fastrunner.data.crops`.
    Raises:
        RuntimeError: outside of a pipeline that a DaliLoader is building.
        ValueError: an unknown kind, or numbers that make no sense.
        TypeError: the data set does not have what is asked for.
    """
    inputs = _declaring.get()
    if inputs is None:
        raise RuntimeError(
            "sample_input() is for pipelines that a DaliLoader builds: give it the function, not a Pipeline"
        )
    return inputs.declare(kind, count, scale, ratio)


def has_input(kind: str) -> bool:
    """Whether the data set of the loader that is building has what ``sample_input(kind)`` needs."""
    inputs = _declaring.get()
    needs = {"array": ("images",), "file": ("files",), "encoded": ("files", "encoded"), "label": ("labels",)}
    return inputs is not None and any(hasattr(inputs.dataset, name) for name in needs.get(kind, ()))


def image_channels() -> int:
    """Channels of the images of the loader that is building: those of its arrays, or the three that are decoded."""
    inputs = _declaring.get()
    images = None if inputs is None else getattr(inputs.dataset, "images", None)
    return 3 if images is None else int(images.shape[-1])


@dataclass(frozen=True, slots=True)
class Input:
    """One input of the pipeline.

    Attributes:
        make: called with (epoch, ids).
        heavy: made for one batch at a time, because its rows are large.
    """

    name: str
    make: Make
    heavy: bool = False


class Inputs:
    """The inputs that a pipeline has declared, and what they are fed with.

    Args:
        dataset: has some of ``files``, ``labels``, ``images``, ``encoded``.
        seed: of everything random.
        sizes: ids -> (n, 2), height and width of the images; asked only where there are windows.
    """

    def __init__(self, dataset: Any, seed: int, sizes: Callable[[Ids], NDArray[np.int32]]) -> None:
        self.dataset, self.seed, self._sizes = dataset, seed, sizes
        self.declared: list[Input] = []
        self._uniforms = 0  # columns of random numbers that have been given away

    @property
    def random(self) -> bool:
        """Whether a sample differs from epoch to epoch."""
        return self._uniforms > 0

    @contextmanager
    def declaring(self) -> Iterator[None]:
        """Inside, ``sample_input`` declares here, from the start: a pipeline may be built several times."""
        self.declared, self._uniforms = [], 0
        token = _declaring.set(self)
        try:
            yield
        finally:
            _declaring.reset(token)

    def declare(self, kind: str, count: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Any:
        """The node of a new input; see :func:`sample_input`."""
        _, fn, types = import_dali()
        if kind == "uniform":
            if count < 1:
                raise ValueError(f"count must be >= 1, got {count}")
            return self._source("uniform", self._uniform(count), ndim=1, dtype=types.FLOAT)
        if kind == "window":
            check_crop(scale, ratio)
            return self._source("window", self._window(scale, ratio), ndim=1, dtype=types.INT32)
        if kind == "index":
            return self._source("index", lambda epoch, ids: ids, ndim=0, dtype=types.INT64)
        if kind == "label":
            labels = torch.as_tensor(self._has("labels", kind)).numpy()
            return self._source("label", lambda epoch, ids: labels[ids], ndim=0, dtype=types.INT64)
        if kind == "file" or (kind == "encoded" and hasattr(self.dataset, "files")):
            files = self._has("files", kind)
            node = self._source("file", lambda epoch, ids: file_names(files, ids), ndim=1, dtype=types.UINT8)
            return fn.io.file.read(node) if kind == "encoded" else node
        if kind == "encoded":
            encoded = self._has("encoded", kind)
            rows = partial(_second, partial(encoded_bytes, encoded))
            return self._source("encoded", rows, ndim=1, dtype=types.UINT8, heavy=True)
        if kind == "array":
            rows = partial(_second, _gather(self._has("images", kind)))
            return self._source("array", rows, ndim=3, dtype=types.UINT8, layout="HWC", heavy=True)
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")

    def _source(self, name: str, make: Make, *, heavy: bool = False, **kwargs: Any) -> Any:
        _, fn, _ = import_dali()
        name = f"sample_{name}_{len(self.declared)}"
        self.declared.append(Input(name, make, heavy))
        return fn.external_source(name=name, **kwargs)

    def _has(self, attribute: str, kind: str) -> Any:
        if not hasattr(self.dataset, attribute):
            raise TypeError(
                f"sample_input({kind!r}) needs a data set with `{attribute}`: {type(self.dataset).__name__} has none"
            )
        return getattr(self.dataset, attribute)

    def _columns(self, count: int) -> Callable[[int, Ids], NDArray[np.float64]]:
        """The next ``count`` random numbers of each sample: (epoch, ids) -> (n, count)."""
        first, last = self._uniforms, self._uniforms + count
        self._uniforms = last
        return lambda epoch, ids: uniforms(self.seed, epoch, ids, last)[:, first:]

    def _uniform(self, count: int) -> Make:
        columns = self._columns(count)
        # float32 has 24 bits: rounded to it, the largest float64 below 1 would be 1
        return lambda epoch, ids: (np.floor(columns(epoch, ids) * 2.0**24) * 2.0**-24).astype(np.float32)

    def _window(self, scale: tuple[float, float], ratio: tuple[float, float]) -> Make:
        columns = self._columns(NUM_UNIFORMS)
        return lambda epoch, ids: random_resized_crop(columns(epoch, ids), self._sizes(ids), scale=scale, ratio=ratio)


def file_names(files: Sequence[str], ids: Ids) -> NDArray[np.uint8]:
    """One array for all names, (n, length), padded with zeros: DALI reads a name up to its first zero byte."""
    names = np.array([os.fsencode(files[index]) for index in ids.tolist()])
    return names.view(np.uint8).reshape(len(names), -1)


def encoded_bytes(encoded: Callable[[int], Any], ids: Ids) -> list[NDArray[np.uint8]]:
    """The bytes of each sample, as ``encoded(index)`` gives them: bytes, or anything with a buffer."""
    return [np.frombuffer(encoded(index), dtype=np.uint8) for index in ids.tolist()]


def _second(function: Callable[[Ids], Any], epoch: int, ids: Ids) -> Any:
    """``function(ids)``, whatever the epoch is."""
    return function(ids)


def _gather(images: Any) -> Callable[[Ids], NDArray[np.uint8]]:
    """Rows of an array, gathered by torch: it lets go of the interpreter meanwhile."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise TypeError(f"images must be uint8, (N, H, W, C), got {images.dtype}, {tuple(images.shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written
        whole = torch.from_numpy(images)
    return lambda ids: torch.index_select(whole, 0, torch.from_numpy(ids)).numpy()
