"""The compiled core (csrc/). Import torch before it: both have to run on torch's OpenMP runtime."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

class StaleTable(RuntimeError):
    """The table no longer describes the optimizer. Nothing was written; build a new one."""

class SgdTable:
    """Parameters, gradients and momentum buffers of an optimizer as one list of chunks.

    Tensor i is ``params[i]`` in parameter group ``groups[i]``; ``slots[i]`` is ``state[params[i]]`` and ``buffers[i]``
    its momentum buffer (a new one is stored in the slot by the first step that uses it), both None where the parameter
    needs none so far. All tensors must be ones that ``refusal`` has nothing against.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        params: list[Tensor],
        groups: Sequence[int],
        slots: list[dict[str, Any] | None],
        buffers: list[Tensor | None],
        isa: str | None = None,
    ) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        max_norm: float | None,
        write_back: bool,
        rest_sum_squares: float,
    ) -> tuple[float, float, list[Tensor]]:
        """Norm, clip and update in one pass: (grad_norm, clip_coef, tensors written to).

        Options are read from ``param_groups``, gradients from the parameters. Both numbers are float32 values.
        ``max_norm`` None: no clipping, and grad_norm is NaN. ``rest_sum_squares`` belongs to gradients that are not in
        the table and counts in the norm. Raises StaleTable before anything is written. Bumping version counters is left
        to the caller.
        """

    @property
    def num_tensors(self) -> int: ...
    @property
    def isa(self) -> str: ...

def supported_isas() -> list[str]:
    """Instruction sets that this CPU can run, best first."""

def active_isa() -> str:
    """The one in use: FASTRUNNER_ISA if set, else the best."""

def openmp_library() -> str:
    """File of the OpenMP runtime that the core was linked to: torch's own."""

def refusal(tensor: Tensor, like: Tensor | None = None) -> str | None:
    """Why the core cannot update this tensor, or not together with a parameter `like` it; None if it can."""
