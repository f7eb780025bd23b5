"""A torch DataLoader that can start at any batch of any epoch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .order import EpochSampler


class TorchLoader(DataLoader[Any]):
    """A DataLoader over an :class:`EpochSampler`; everything else is torch's.

    numpy and random in workers are seeded from torch's worker seed, which is a function of (seed, epoch, worker); the
    global generator has no part in it.
    """

    sampler: EpochSampler
    batch_size: int

    def __init__(self, dataset: Dataset[Any], *, sampler: EpochSampler, **kwargs: Any) -> None:
        kwargs.setdefault("worker_init_fn", seed_worker)
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(dataset, sampler=sampler, **kwargs)

    @property
    def seed(self) -> int:
        """Seed of the sample order; a resume sets it to the interrupted run's."""
        return self.sampler.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.sampler.seed = seed

    def seek(self, epoch: int, position: int) -> None:
        """Let the next ``iter()`` start at batch ``position`` of ``epoch``. Decodes nothing that is skipped."""
        self.sampler.seek(epoch, position * self.batch_size)
        self.generator.manual_seed(self.seed * 1_000_003 + epoch)


def seed_worker(worker_id: int) -> None:
    """Give numpy and random in a worker the seed that torch has given it."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)
