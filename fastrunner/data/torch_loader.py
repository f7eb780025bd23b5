"""A torch DataLoader that can start at any batch of any epoch, with the same samples for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .keyed import Key, Keyed, seed_worker
from .loader import EpochLoader
from .order import BatchOrder, EpochSampler
from .rng import generators_kept, sample_seed


class TorchLoader(EpochLoader, DataLoader[Any]):
    """A DataLoader whose order follows from (seed, epoch, position); everything else is torch's.

    Before each sample the global generators (python, numpy, torch) are seeded from (seed, epoch, sample id):
    augmentation is the same with any number of workers, and after a resume. Without workers the main process's own
    generators are put back after each batch.

    Args:
        dataset: map-style, with a length.
        batch_size, shuffle, seed, rank, world_size, drop_last: see :class:`~fastrunner.data.order.BatchOrder`.
        num_workers: processes; 0: samples are made by who asks for them, none ahead.
        seed_samples: False leaves the generators to torch: workers have theirs, which a resume cannot continue.
        persistent_workers: keep the processes over epochs. They hold the data set as it was when they started. Where
            ``prefetch_over_epoch_end`` is set they stay in any case, and make the next epoch's first batches early.
        **kwargs: for the DataLoader, e.g. ``collate_fn``, ``pin_memory``, ``prefetch_factor``, ``worker_init_fn``.
    Raises:
        ValueError: an empty data set.
        RuntimeError: from the iterator: a worker died.
    """

    batch_size: int

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        seed_samples: bool = True,
        persistent_workers: bool = False,
        **kwargs: Any,
    ) -> None:
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise ValueError(f"data set {type(dataset).__name__} has no samples")
        shares: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "rank": rank, "world_size": world_size}
        self.order = BatchOrder(len(dataset), batch_size, drop_last=drop_last, **shares)  # type: ignore[arg-type]
        kwargs.setdefault("worker_init_fn", seed_worker)
        kwargs.setdefault("generator", torch.Generator())
        persistent_workers = persistent_workers and num_workers > 0  # torch refuses it without workers
        kwargs.update(num_workers=num_workers, persistent_workers=persistent_workers)
        sampler = EpochSampler(self.order)
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **kwargs)
        self.seed_samples = seed_samples
        self._keys = _Keys(self.order)
        self._options = {**kwargs, "collate_fn": self.collate_fn}
        self._engine: DataLoader[Any] | None = None
        self._made: Iterator[Any] | None = None  # torch's iterator

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's type is its own iterator's
        return EpochLoader.__iter__(self)

    def _start(self, epoch: int, position: int) -> None:
        if self._made is not None and self._goes_on(epoch, position):
            return
        self._end_workers()
        if self._engine is None:
            dataset = Keyed(self.dataset, self.seed if self.seed_samples else None)
            self._engine = DataLoader(dataset, batch_sampler=self._keys, **self._options)
        self._keys.places = self._places(epoch, position)
        if isinstance(self.generator, torch.Generator):
            self.generator.manual_seed(sample_seed(self.seed, epoch, 0) >> 1)
        self._made = iter(self._engine)

    def _next(self) -> Any:
        assert self._made is not None  # _start came before
        if self.num_workers == 0 and self.seed_samples:
            with generators_kept():
                batch = next(self._made)
        else:
            batch = self._from_workers(self._made)
        self._advance()
        return batch

    def _epoch_over(self) -> None:
        if self._ahead is None or not self._goes_on(*self._ahead):  # as in torch, idle workers hold no memory
            self._end_workers()

    @staticmethod
    def _from_workers(made: Iterator[Any]) -> Any:
        try:
            return next(made)
        except (EOFError, OSError, StopIteration) as error:
            # The data set's own error; or a worker died while it handed over a batch. Where torch noticed that inside
            # somebody's destructor, which swallows errors, it ends the epoch: but we ask for no more than it has.
            workers = {worker.sentinel: worker for worker in getattr(made, "_workers", ())}
            if "in DataLoader worker process" in str(error):
                raise
            if not wait(list(workers), timeout=2) and not isinstance(error, StopIteration):
                raise
            codes = [worker.exitcode for worker in workers.values() if not worker.is_alive()]
            raise RuntimeError(
                f"a worker process of the loader died (exit codes {codes}): it was killed, perhaps for want of memory, "
                "or a library in it crashed; workers_per_gpu=0 shows the error in this process"
            ) from error

    def _stop(self) -> None:
        self._end_workers(stopping=True)
        self._engine = None

    def _end_workers(self, stopping: bool = False) -> None:
        """Now, not when the iterator is collected: the traceback of an error keeps it, and so do cycles."""
        if self.persistent_workers and not stopping:
            return
        made, self._made = self._made, None
        shutdown = getattr(made, "_shutdown_workers", None)  # torch's own; there is no public way
        if shutdown is not None:
            shutdown()


class _Keys:
    """The batch sampler: lists of (epoch, sample id).

    It does not know the loader: where the garbage collector has to end torch's iterator, because it is in a cycle, its
    queues are closed before its workers hear of the end, and each of them is waited for in vain, for 5 s.
    """

    def __init__(self, order: BatchOrder) -> None:
        self._order = order
        self.places: Iterator[tuple[int, int]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        places, self.places = self.places, iter(())
        for epoch, position in places:
            yield [(epoch, index) for index in self._order.ids(epoch, position).tolist()]
