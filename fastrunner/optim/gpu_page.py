"""What an update on a GPU is told in each step, sent there in one copy: addresses of gradients, and options.

Both are new in almost every iteration. They are written into pinned memory, copied without waiting, and read by the
kernels behind the copy in the same stream. A page is never written twice while a copy may still read it: torch's
allocator of pinned memory gives it out again when the copy has happened. A page that was copied inside a CUDA graph
belongs to that graph, which copies it again at every replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.prepare import NUM_VALUES

NUM_SPARES = 4  # steps that may be captured between two that are not: pinned memory cannot be asked for in a capture


class Page:
    """The device's copy, and the way there.

    Args:
        num_tensors: number of gradients.
        num_groups: number of parameter groups.
        device: where the kernels run. On the CPU (Triton's interpreter) nothing is pinned.
    Attributes:
        grads: int64 (num_tensors,) on the device.
        values: float64 (1 + num_groups, 8) on the device; kernels/prepare.py says what stands where.
    """

    def __init__(self, num_tensors: int, num_groups: int, device: torch.device) -> None:
        self._num_tensors = num_tensors
        self._page = torch.zeros(num_tensors + (1 + num_groups) * NUM_VALUES, dtype=torch.int64, device=device)
        self.grads = self._page[:num_tensors]
        self.values = self._page[num_tensors:].view(torch.float64).view(-1, NUM_VALUES)
        self._pinned = device.type == "cuda"
        self._spares: list[Tensor] = []
        self._captured: list[Tensor] = []  # a graph reads them for as long as it is replayed
        self._fill_spares()

    def send(self, addresses: Sequence[int], shared: Sequence[float], options: Sequence[Sequence[float]]) -> None:
        """Copy to the device; returns before the copy has happened.

        Args:
            addresses: of each gradient, 0 for none.
            shared: row 0 of ``values``, or its first columns.
            options: the other rows, or their first columns; of equal lengths.
        Raises:
            RuntimeError: too many steps were captured in a row.
        """
        host = self._host()
        numbers = host.numpy()
        numbers[: self._num_tensors] = addresses
        values = numbers[self._num_tensors :].view(np.float64).reshape(-1, NUM_VALUES)
        values[...] = 0.0
        values[0, : len(shared)] = shared
        if options:
            values[1:, : len(options[0])] = options
        self._page.copy_(host, non_blocking=True)

    def _host(self) -> Tensor:
        if not capturing(self._page.device):
            self._fill_spares()
            return self._new_host()
        if not self._spares:
            raise RuntimeError(
                f"more than {NUM_SPARES} optimizer steps were captured into CUDA graphs with none outside of a capture "
                "between them: step once without capturing (a warm-up step does) before the next capture"
            )
        self._captured.append(self._spares.pop())
        return self._captured[-1]

    def _new_host(self) -> Tensor:
        return torch.empty(self._page.shape, dtype=torch.int64, device="cpu", pin_memory=self._pinned)

    def _fill_spares(self) -> None:
        while len(self._spares) < NUM_SPARES:
            self._spares.append(self._new_host())


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
