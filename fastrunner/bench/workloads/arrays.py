"""Batches out of arrays in memory: one gather a batch, nothing in the background."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...data.order import epoch_indices


class ArrayLoader:
    """dict(img, gt_label) by rows of two tensors; a source as ``build_dataloader`` makes them.

    Args:
        images: (N, ...); labels: (N,).
        drop_last: leave out the last, incomplete batch.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, batch_size: int, shuffle: bool, seed: int, drop_last: bool = False
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self._start = (0, 0)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def seek(self, epoch: int, position: int = 0) -> None:
        """Let the next ``iter()`` start at batch ``position`` of ``epoch``."""
        self._start = (epoch, position)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, position = self._start
        self._start = (epoch + 1, 0)
        order = torch.from_numpy(epoch_indices(len(self.labels), seed=self.seed, epoch=epoch, shuffle=self.shuffle))
        for number in range(position, len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield {"img": self.images[rows], "gt_label": self.labels[rows]}
