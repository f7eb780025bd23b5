"""A data set asked by (epoch, sample id), so that each sample can be seeded by itself, in whatever process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .rng import seed_sample

Key = tuple[int, int]  # (epoch, sample id)


class Keyed(Dataset[Any]):
    """The user's data set by (epoch, sample id), seeded for each. Other attributes are the data set's."""

    def __init__(self, dataset: Dataset[Any], seed: int | None) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, keys: list[Key]) -> Any:
        together = getattr(self.dataset, "__getitems__", None)
        if together is None:
            return [self._one(epoch, index) for epoch, index in keys]
        if self.seed is not None:
            seed_sample(self.seed, *keys[0])  # a data set that makes a batch in one call is seeded once
        return together([index for _, index in keys])

    def _one(self, epoch: int, index: int) -> Any:
        if self.seed is not None:
            seed_sample(self.seed, epoch, index)
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:  # e.g. torch.utils.data.get_worker_info().dataset.files
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def seed_worker(worker_id: int) -> None:
    """Give numpy and random in a worker the seed that torch has given it."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)
