"""What a DALI pipeline is fed with: a function of (seed, epoch, position), and of which samples cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..order import BatchOrder
from .inputs import Ids, Inputs

_BLOCK = (
    512  # samples whose names, windows and numbers are made together: numpy costs 0.2 ms a call, hardly more for many
)


@dataclass(slots=True)
class Batch:
    """A batch on its way through the pipeline.

    Attributes:
        rows: inputs of the pipeline, by name; DALI may read them until the batch is made.
        made: what the loader hands over, once it is made.
        error: what is raised instead.
    """

    epoch: int
    position: int
    ids: Ids
    labels: Tensor | None
    rows: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class Feed:
    """Makes a pipeline's inputs.

    Attributes:
        unreadable: sample id -> why; its place is taken by the next sample of the epoch that is not in here.
        doomed: (epoch, position) -> why the batch cannot be made.
    """

    def __init__(self, order: BatchOrder, inputs: Inputs, labels: Tensor | None) -> None:
        self.order, self.inputs = order, inputs
        self.unreadable: dict[int, str] = {}
        self.doomed: dict[tuple[int, int], Exception] = {}
        self._labels = labels
        self._block: tuple[Any, Ids, dict[str, Any]] | None = None

    def batch(self, epoch: int, position: int) -> Batch:
        """The batch, with all its inputs."""
        per_block = max(1, _BLOCK // self.order.batch_size)
        number, place = divmod(position, per_block)
        key = (epoch, number, self.order.seed, self.order.shifted, len(self.unreadable))
        if self._block is None or self._block[0] != key:
            self._block = (key, *self._make_block(epoch, number * per_block, per_block))
        rows = slice(place * self.order.batch_size, (place + 1) * self.order.batch_size)
        ids = self._block[1][rows]
        inputs = {name: values[rows] for name, values in self._block[2].items()}
        inputs.update(self._make(epoch, ids, heavy=True))
        labels = None if self._labels is None else self._labels[torch.from_numpy(ids)]
        return Batch(epoch, position, ids, labels, inputs, error=self.doomed.pop((epoch, position), None))

    def single(self, epoch: int, index: int) -> dict[str, Any]:
        """The inputs of one sample, as a batch of one."""
        ids = np.array([index], dtype=np.int64)
        return {**self._make(epoch, ids, heavy=False), **self._make(epoch, ids, heavy=True)}

    def after(self, epoch: int, position: int) -> tuple[int, int]:
        """The batch that follows."""
        return (epoch, position + 1) if position + 1 < self.order.num_batches(epoch) else (epoch + 1, 0)

    def _make(self, epoch: int, ids: Ids, *, heavy: bool) -> dict[str, Any]:
        return {one.name: one.make(epoch, ids) for one in self.inputs.declared if one.heavy is heavy}

    def _make_block(self, epoch: int, position: int, count: int) -> tuple[Ids, dict[str, Any]]:
        last = min(position + count, self.order.num_batches(epoch))
        batches = [self._readable(epoch, number) for number in range(position, last)]
        ids = np.concatenate(batches)
        return ids, self._make(epoch, ids, heavy=False)

    def _readable(self, epoch: int, position: int) -> Ids:
        ids = self.order.ids(epoch, position)
        if not self.unreadable:
            return ids
        return np.array(
            [
                self._instead(epoch, position, row) if index in self.unreadable else index
                for row, index in enumerate(ids.tolist())
            ],
            dtype=np.int64,
        )

    def _instead(self, epoch: int, position: int, row: int) -> int:
        """The next sample of the epoch on this rank that can be read, behind its end from the start on."""
        num_batches = self.order.num_batches(epoch)
        for step in range(num_batches + 1):
            ids: NDArray[np.int64] = self.order.ids(epoch, (position + step) % num_batches)
            for index in ids[row + 1 :].tolist() if step == 0 else ids.tolist():
                if index not in self.unreadable:
                    return int(index)
        raise RuntimeError(f"none of the samples of epoch {epoch} can be read")


def feed_all(pipe: Any, rows: dict[str, Any]) -> None:
    """Feed all inputs of a pipeline: 10 to 25 us each."""
    from nvidia.dali.tensors import TensorListCPU

    for name, values in rows.items():
        # DALI would make the same of an array, after 5 us of looking what it is
        pipe.feed_input(name, TensorListCPU(values) if isinstance(values, np.ndarray) else values)
