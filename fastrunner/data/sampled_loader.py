"""A torch DataLoader with a sampler of the user's own: the order is the sampler's, samples are seeded as ours are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import rng
from .keyed import Keyed, seed_worker


class SampledLoader(DataLoader[Any]):
    """A DataLoader over ``sampler`` or ``batch_sampler``, or over an IterableDataset.

    Before each sample of a map-style data set the global generators are seeded from (seed, epoch, sample id), and put
    back afterwards where there are no workers. Resuming runs the sampler again, not the samples: see ``foreign``.

    Args:
        seed_samples: False leaves the generators to torch.
        **kwargs: for the DataLoader.
    Attributes:
        epoch: that the samples are seeded for. IterLoader and the runners set it; ``iter()`` by itself does not.
    """

    epoch = 0

    def __init__(self, dataset: Dataset[Any], *, seed: int, seed_samples: bool = True, **kwargs: Any) -> None:
        kwargs.setdefault("worker_init_fn", seed_worker)
        super().__init__(dataset, **kwargs)
        self.seed = seed
        self.seed_samples = seed_samples and not isinstance(dataset, IterableDataset)

    def __iter__(self) -> Any:
        return self.over(self.batch_sampler) if self.seed_samples else super().__iter__()

    def over(self, batch_sampler: Any) -> Iterator[Any]:
        """The batches of ``batch_sampler``'s indices."""
        options: dict[str, Any] = {}
        if self.num_workers > 0:
            options = {"prefetch_factor": self.prefetch_factor, "multiprocessing_context": self.multiprocessing_context}
        seed = self.seed if self.seed_samples else None
        dataset: Dataset[Any] = Keyed(self.dataset, seed)
        collate = self.collate_fn
        if seed is not None and self.num_workers == 0:
            dataset = kept = _Kept(dataset)
            collate = kept.collate(collate)
        batches: Iterator[Any] = iter(
            DataLoader(
                dataset,
                batch_sampler=_WithEpoch(batch_sampler, self.epoch),
                num_workers=self.num_workers,
                collate_fn=collate,
                pin_memory=self.pin_memory,
                timeout=self.timeout,
                worker_init_fn=self.worker_init_fn,
                generator=self.generator,
                **options,
            )
        )
        return batches


class _WithEpoch:
    """A batch sampler's lists of indices as lists of (epoch, index). It begins when torch asks it to, not later."""

    def __init__(self, batch_sampler: Any, epoch: int) -> None:
        self._sampler, self._epoch = batch_sampler, epoch

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        return map(self._keyed, iter(self._sampler))

    def _keyed(self, batch: Any) -> list[tuple[int, Any]]:
        return [(self._epoch, index) for index in batch]

    def __len__(self) -> int:
        return len(self._sampler)


class _Kept(Dataset[Any]):
    """Samples made in this process, and batches collated, without a trace in the global generators.

    What the sampler draws is between two batches, and stays.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._state: Any = None

    def __getitems__(self, keys: list[tuple[int, Any]]) -> Any:
        self._state = rng.capture()
        return self._dataset.__getitems__(keys)

    def collate(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def collate_and_put_back(samples: Any) -> Any:
            batch = collate(samples)
            rng.put_back(self._state)
            return batch

        return collate_and_put_back


def needs_own_sampler(dataset: Any, options: dict[str, Any]) -> bool:
    """Whether ``build_dataloader`` was asked for an order that is not ours."""
    return isinstance(dataset, IterableDataset) or "sampler" in options or "batch_sampler" in options


def make_sampled_loader(
    dataset: Any, *, batch_size: int, shuffle: bool, drop_last: bool, rank: int, world_size: int, **kwargs: Any
) -> SampledLoader:
    """``build_dataloader`` for a sampler of the user's. Shares for several ranks are the sampler's affair.

    Raises:
        ValueError: both a sampler and a batch_sampler, and what else torch refuses.
    """
    if "batch_sampler" not in kwargs:
        kwargs.update(batch_size=batch_size, drop_last=drop_last)
    return SampledLoader(dataset, **kwargs)
