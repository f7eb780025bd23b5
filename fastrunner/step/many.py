"""Several iterations of one compiled step in one call: what a recipe hands to ``plan/burst.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .binding import Binding

# (batches, rows [k, width], scalars [k, num_outputs]) -> (completed, outputs of the last one, why the next failed)
Burst = Callable[[list[Any], Tensor, Tensor], tuple[int, Sequence[Any], str]]


@dataclass(frozen=True)
class Many:
    """A step that can run k batches one after the other, without Python in between.

    Attributes:
        binding: whose row each iteration gets its own values of.
        burst: runs them: row j is in place before iteration j, its outputs are in ``scalars[j]`` after it (float64).
            It ends after the last batch, before one of another kind, where an iteration fails, and before 20 ms are
            over; what did not complete has no row of scalars. Nobody's Python runs in it, so that no signal is handled
            before it has returned.
        build: flat outputs -> the dict of ``train_step``; of tensors, or of the floats in a row of scalars.
        num_outputs: of an iteration.
        clips: the last output is the norm of the gradients.
        ran: told how many iterations have completed.
    """

    binding: Binding
    burst: Burst
    build: Callable[[Sequence[Any]], dict[str, Any]]
    num_outputs: int
    clips: bool
    ran: Callable[[int], None]
