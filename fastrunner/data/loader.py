"""Sources of batches for the runners: the endless ``IterLoader``, starting an epoch anywhere, ``build_dataloader``.

A source is any iterable with a length. Ours can also ``seek(epoch, position)``; others are walked to a position.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..dist import get_dist_info
from ..registry import DATASETS, build_from_cfg
from .order import EpochSampler
from .torch_loader import TorchLoader

_logger = logging.getLogger("fastrunner")


def start_epoch(source: Any, epoch: int, position: int = 0) -> Iterator[Any]:
    """An iterator over ``epoch`` of ``source`` from batch ``position`` on.

    A source with ``seek`` goes there at once. Of any other the batches before ``position`` are made and dropped; the
    log says how long it took. Starting in the middle leaves torch's generator as it was: the draw that a DataLoader
    makes when it starts belongs to the epoch's beginning, and is in the generator's state already.

    Raises:
        ValueError: the source ends before ``position``.
    """
    seek = getattr(source, "seek", None)
    if seek is not None:
        seek(epoch, position)
    generator_state = torch.get_rng_state()
    batches: Iterator[Any] = iter(source)
    if position == 0:
        return batches
    if seek is None:
        _skip(batches, epoch, position)
    torch.set_rng_state(generator_state)
    return batches


def _skip(batches: Iterator[Any], epoch: int, position: int) -> None:
    begin = time.perf_counter()
    for skipped in range(position):
        try:
            next(batches)
        except StopIteration:
            raise ValueError(
                f"cannot resume at batch {position} of epoch {epoch}: the loader gave only {skipped} batches; "
                "resume with the data it was saved with"
            ) from None
    _logger.info(
        f"skipped {position} batches in {time.perf_counter() - begin:.1f} s to resume; a loader from build_dataloader "
        "would seek"
    )


def set_epoch(source: Any, epoch: int) -> None:
    """Tell a foreign source's sampler, or its batch sampler's, which epoch it is; nothing where it cannot be told."""
    samplers = (getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None))
    for sampler in samplers:
        tell = getattr(sampler, "set_epoch", None)
        if tell is not None:
            tell(epoch)
            return


class IterLoader:
    """An endless iterator over a source; starts the next epoch when one is used up.

    Args:
        dataloader: any iterable with a length; its iterator is made at the first ``next()``.
    Raises:
        TypeError: it has no length, or cannot be iterated.
        ValueError: it is empty.
    Attributes:
        epoch: epochs used up.
        position: batches taken from the current epoch.
    """

    def __init__(self, dataloader: Any) -> None:
        check_source(dataloader)
        self._dataloader = dataloader
        self._batches: Iterator[Any] | None = None
        self._epoch = 0
        self.position = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def dataloader(self) -> Any:
        """The source itself."""
        return self._dataloader

    def seek(self, epoch: int, position: int) -> None:
        """Let the next batch be number ``position`` of ``epoch``."""
        self._epoch, self.position = epoch, position
        self._batches = None

    def __next__(self) -> Any:
        if self._batches is None:
            if self._epoch:
                set_epoch(self._dataloader, self._epoch)
            self._batches = start_epoch(self._dataloader, self._epoch, self.position)
        try:
            batch = next(self._batches)
        except StopIteration:
            batch = self._wrap()
        self.position += 1
        return batch

    def _wrap(self) -> Any:
        """Start the next epoch and take its first batch."""
        self._epoch += 1
        self.position = 0
        set_epoch(self._dataloader, self._epoch)
        self._batches = start_epoch(self._dataloader, self._epoch)
        for batch in self._batches:
            return batch
        raise ValueError(f"the data loader gives no batch in epoch {self._epoch}, though its length is {len(self)}")

    def pause(self) -> None:
        """Let go of the iterator, and with it of its worker processes; the next batch starts it again where it was."""
        self._batches = None

    def __iter__(self) -> IterLoader:
        return self

    def __len__(self) -> int:
        return len(self._dataloader)


def seed_of(source: Any) -> dict[str, int]:
    """``{"seed": ...}`` of a source whose order follows from one, else ``{}``."""
    seed = getattr(source, "seed", None)
    return {"seed": int(seed)} if isinstance(seed, (int, np.integer)) else {}


def check_source(source: Any, name: str = "the data loader") -> None:
    """Raise unless ``source`` can be iterated, has a length, and is not empty."""
    if not hasattr(source, "__len__") or not hasattr(source, "__iter__"):
        raise TypeError(f"{name} must be an iterable with a length (a DataLoader, a list), got {type(source).__name__}")
    if len(source) == 0:
        raise ValueError(f"{name} is empty: its data set has no samples, or fewer than a batch with drop_last=True")


def build_dataloader(
    dataset: Any,
    samples_per_gpu: int,
    workers_per_gpu: int,
    num_gpus: int = 1,
    dist: bool | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    drop_last: bool = False,
    **kwargs: Any,
) -> Any:
    """The fastest loader for ``dataset``: its own (``make_loader``), or a torch DataLoader that can seek.

    Args:
        dataset: a map-style data set, or a dict that DATASETS builds one from.
        samples_per_gpu: batch_size of each GPU; without ``dist`` a batch has ``num_gpus`` times as many.
        workers_per_gpu: worker processes or threads for each GPU.
        dist: give each rank its share; None: where a process group is up.
        seed: of the order; None takes torch's initial seed, so ``torch.manual_seed`` decides. Rank 0's counts.
        **kwargs: for the DataLoader, e.g. ``pin_memory``, ``collate_fn``, ``persistent_workers``.
    Returns:
        An iterable with a length, ``seek(epoch, position)`` and ``batch_size``.
    Raises:
        TypeError, ValueError: counts that are not ints, or not positive.
    """
    for name, count, least in (
        ("samples_per_gpu", samples_per_gpu, 1),
        ("workers_per_gpu", workers_per_gpu, 0),
        ("num_gpus", num_gpus, 1),
    ):
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} must be an int, got {type(count).__name__}")
        if count < least:
            raise ValueError(f"{name} must be >= {least}, got {count}")
    if isinstance(dataset, dict):
        dataset = build_from_cfg(dataset, DATASETS)
    rank, world_size = get_dist_info() if dist is not False else (0, 1)
    if world_size > 1:
        num_gpus = 1  # one process a GPU
    seed = _shared_seed(world_size) if seed is None else int(seed)
    batch_size, num_workers = num_gpus * samples_per_gpu, num_gpus * workers_per_gpu

    make_loader = getattr(dataset, "make_loader", None)
    if make_loader is not None:
        return make_loader(
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            **kwargs,
        )
    if len(dataset) == 0:
        raise ValueError(f"data set {type(dataset).__name__} has no samples")
    sampler = EpochSampler(len(dataset), seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
    return TorchLoader(
        dataset, sampler=sampler, batch_size=batch_size, num_workers=num_workers, drop_last=drop_last, **kwargs
    )


def _shared_seed(world_size: int) -> int:
    """Torch's initial seed, the same on every rank, small enough for every generator."""
    seed = torch.initial_seed() % 2**31
    if world_size > 1:
        shared = [seed]
        torch.distributed.broadcast_object_list(shared, src=0)
        seed = shared[0]
    return seed
