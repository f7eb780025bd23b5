"""A ring of rows on the device: each replay writes the scalars it logs into the next one, which the device chooses.

A replay writes to the addresses of its capture, so that without a ring each would overwrite what the one before it
logged, before anybody has read it. A row is written again after ``ROWS`` replays; whoever still holds a value of it
then gets memory of its own for it first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROWS = 256  # more than a log interval holds, mostly
HELD = 3  # references to a view that are no user's: of its row, the loop, and the argument


class ScalarRing:
    """Rows of scalars, one table a dtype.

    Args:
        backend: where they lie.
        dtypes: of the scalars.
        rows: of the ring.
    """

    def __init__(self, backend: Any, dtypes: Sequence[torch.dtype], rows: int = ROWS) -> None:
        self.dtypes, self._num_rows = tuple(dtypes), rows
        self._places = {kind: [i for i, other in enumerate(dtypes) if other == kind] for kind in dtypes}
        self._tables = {
            kind: backend.static(torch.zeros(rows, len(places), dtype=kind)).zero_()
            for kind, places in self._places.items()
        }
        self._slot: Tensor = backend.static(torch.zeros(1, dtype=torch.int64)).zero_()
        self._at = 0  # what the device's slot will be when all replays so far have run
        self._views: list[tuple[Tensor, ...]] = [self._row(at) for at in range(rows)]

    @property
    def tensors(self) -> list[Tensor]:
        """All memory of it."""
        return [self._slot, *self._tables.values()]

    def write(self, scalars: Sequence[Tensor]) -> None:
        """Part of a capture: the scalars into the row that is next, and on to the one behind it."""
        for kind, places in self._places.items():
            row = torch.stack([scalars[i].reshape(()) for i in places])
            self._tables[kind].index_copy_(0, self._slot, row[None])
        self._slot.add_(1).remainder_(self._num_rows)

    def take(self) -> tuple[Tensor, ...]:
        """What the next replay will write, 0-D each. To be called once before each replay.

        Cost: 0.1 us a scalar; a copy where somebody holds what the row held before.
        """
        at, row = self._at, self._views[self._at]
        self._at = at + 1 if at + 1 < self._num_rows else 0
        for view in row:
            if sys.getrefcount(view) > HELD:
                row = self._views[at] = self._give_away(at)
                break
        return row

    def _row(self, at: int) -> tuple[Tensor, ...]:
        found: dict[int, Tensor] = {}
        for kind, places in self._places.items():
            row = self._tables[kind].data[at]  # data: the log takes a counted version for a write since it was logged
            found |= dict(zip(places, row.unbind(), strict=True))
        return tuple(found[i] for i in range(len(self.dtypes)))

    def _give_away(self, at: int) -> tuple[Tensor, ...]:
        """Let holders of a row's values keep them in memory of their own; new views of the row."""
        for view in self._views[at]:
            view.data = view.clone()
        return self._row(at)
