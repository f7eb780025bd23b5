"""The order of samples: a pure function of (seed, epoch, rank), so that resuming is a seek.

Padding is DistributedSampler's: the epoch's order is repeated from its start until every rank gets equally many, or cut
(``drop_last``); rank r takes positions r, r + world_size, ...
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


def epoch_indices(
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    drop_last: bool = False,
) -> NDArray[np.int64]:
    """The sample ids that ``rank`` sees in ``epoch``, in order.

    Returns:
        int64 array of length ``ceil(num_samples / world_size)``, or the floor of it with ``drop_last``.
    Raises:
        ValueError: nothing to order, or a rank outside the world.
    """
    if num_samples <= 0:
        raise ValueError(f"a data set must have samples, got {num_samples}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if shuffle:
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)
    else:
        order = np.arange(num_samples, dtype=np.int64)
    per_rank = num_samples // world_size if drop_last else -(-num_samples // world_size)
    return np.resize(order, per_rank * world_size)[rank::world_size]


class EpochSampler(Sampler[int]):
    """A torch sampler over :func:`epoch_indices` that can start anywhere.

    Each ``iter()`` runs one epoch and makes the next one current; ``seek`` goes to another. ``len()`` is the length of
    a whole epoch, also after a seek into its middle.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.num_samples, self.shuffle, self.drop_last = num_samples, shuffle, drop_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self.start = 0  # sample position that the next iter() starts from
        self._length = len(self._indices(0))

    def _indices(self, epoch: int) -> NDArray[np.int64]:
        return epoch_indices(
            self.num_samples,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
        )

    def set_epoch(self, epoch: int) -> None:
        self.seek(epoch, 0)

    def seek(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        indices = self._indices(self.epoch)[self.start :]
        self.epoch, self.start = self.epoch + 1, 0
        return iter(indices.tolist())
