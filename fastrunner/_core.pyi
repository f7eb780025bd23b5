"""The compiled core (csrc/). Import torch before it: both have to run on torch's OpenMP runtime."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

class StaleTable(RuntimeError):
    """The table no longer describes the optimizer. Nothing was written; build a new one."""

class UpdateTable:
    """Parameters of an optimizer, and all that a step reads and writes, as one list of chunks.

    ``algorithm`` is "sgd" or "adam". Tensor i is ``params[i]`` in parameter group ``groups[i]``; -1: it is only
    averaged. ``slots[i]`` is ``state[params[i]]`` and ``states[i]`` a dict of what the table uses of it
    (momentum_buffer, exp_avg, exp_avg_sq, max_exp_avg_sq, step, master; a momentum_buffer that the slot lacks is stored
    there by the first step that uses it), both None where the parameter needs none so far. ``averages[i]`` follows
    ``params[i]``, or is None.
    All tensors must be ones that ``refusal`` has nothing against.
    """

    def __init__(
        self,
        algorithm: str,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        params: list[Tensor],
        groups: Sequence[int],
        slots: list[dict[str, Any] | None],
        states: list[dict[str, Tensor] | None],
        averages: list[Tensor | None],
        isa: str | None = None,
    ) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        max_norm: float | None,
        write_back: bool,
        rest_sum_squares: float,
        momentum: float | None,
        zero: bool,
        skip_nonfinite: bool,
    ) -> tuple[float, float, bool]:
        """Norm, clip, update and average in one pass: (grad_norm, clip_coef, skipped).

        Options are read from ``param_groups``, gradients from the parameters. Both numbers are float32 values.
        ``max_norm`` None: no clipping; grad_norm is NaN then, unless ``skip_nonfinite`` (no update where the norm is
        not finite) wants it. ``rest_sum_squares``: of gradients that are not in the table; it counts in the norm.
        ``momentum`` of the averages; None: they stay. ``zero``: all gradients of the table are None afterwards. Raises
        StaleTable before anything is written. What was written to has a new version for autograd, state excepted.
        """

    @property
    def num_tensors(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def has_handles(self) -> bool:
        """Whether libtorch's own functions read the tensors; otherwise Python's ways do, more slowly."""

def supported_isas() -> list[str]:
    """Instruction sets that this CPU can run, best first."""

def active_isa() -> str:
    """The one in use: FASTRUNNER_ISA if set, else the best."""

def openmp_library() -> str:
    """File of the OpenMP runtime that the core was linked to: torch's own."""

def refusal(tensor: Tensor, like: Tensor | None = None, as_float: bool = False) -> str | None:
    """Why the core cannot update this tensor, or not together with a parameter `like` it; None if it can.

    With `like` the dtype has to be the parameter's, or float32 if `as_float`.
    """
