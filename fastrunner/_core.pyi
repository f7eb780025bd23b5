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

class AotLibrary:
    """A graph that AOTInductor compiled to a shared library, loaded; ``AotStep`` runs it.

    The file has to be whole: loading half of one ends the process. Raises RuntimeError: it cannot be loaded, is no such
    library, or this torch lacks what drives one.
    """

    def __init__(self, path: str) -> None: ...
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...

class AotStep:
    """Iterations of a compiled step on tensors that were bound once.

    The library's inputs are ``bound``, then the tensors of the batch. ``written``: those that it writes to, as far as
    autograd has to know; each call gives them a new version. ``row``: one of ``bound``, float64, 1-D: what changes from
    one iteration to the next. ``batch``: an example, a dict, list or tuple of tensors. Later ones have to be of its
    type, with its keys in its order, and tensors of the same shape, strides, dtype and device that need no gradient.
    The step keeps the memory of what is bound, and nothing of a batch. Raises ValueError.
    """

    def __init__(
        self, library: AotLibrary, bound: list[Tensor], written: list[Tensor], row: Tensor, batch: Any
    ) -> None: ...
    def __call__(self, batch: Any) -> list[Tensor] | None:
        """One iteration: its outputs; None: the batch is of another kind, and nothing was run.

        Fill in ``row`` before. Raises RuntimeError: the run failed; tensors may have been written to. 0.5 us besides
        the library's own work, 25 ns a bound and 100 ns a batch's tensor. A run that is not short lets go of the GIL.
        """

    def burst(
        self, batches: list[Any], rows: Tensor, scalars: Tensor, seconds: float = 0.02
    ) -> tuple[int, list[Tensor], str]:
        """Several iterations without Python: (completed, outputs of the last one, why the next one failed or "").

        Before iteration j, ``rows[j]`` (float64, [>= k, len(row)], contiguous) is copied to ``row``; after it,
        ``scalars[j]`` (float64, [>= k, num_outputs]) holds its outputs, NaN where one is no scalar. It ends after the
        k batches; before a batch of another kind; where an iteration fails; and where the next one, if it took as long
        as the longest so far, would end after ``seconds`` (the first is run in any case). Only completed iterations
        have rows of scalars; one that failed may have written to tensors. What is written to has one new version for
        autograd in all. The GIL is let go meanwhile; a signal is handled by Python after it. Raises ValueError before
        anything is run: a table of another shape.
        """

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

def resize_image(
    image: int,
    height: int,
    width: int,
    out: int,
    out_height: int,
    out_width: int,
    channels: int,
    mirror: bool,
    planar: bool,
    isa: str | None = None,
) -> None:
    """Resize one image of bytes: addresses of ``image``, (height, width, channels), and of ``out``.

    ``out`` is (out_height, out_width, channels), or with ``planar`` (channels, out_height, out_width). Triangular
    filter, widened where the image shrinks (Pillow's BILINEAR). Raises ValueError for sizes below 1, or channels that
    are not 1 to 4. Leaves the GIL.
    """

def dali_resize() -> tuple[int, int, int]:
    """Addresses of (setup, run planar, run interleaved) for DALI's operator that calls functions."""
