"""A stand-in for CUDA graphs on the CPU: for tests of all that surrounds a capture, on machines without a GPU.

Recording notes every operation of torch with the memory that it reads and writes, and leaves that memory and the
generators as they were, as a capture does. Replaying runs the same operations on the same memory. It fails where CUDA
does: at a read by the host, at a tensor that is not on the device (one that was not announced), at pinned or host
memory that is made, at a generator that was not registered. And it says so where CUDA says nothing: at a replay
whose memory was given up or replaced in between.

What it cannot see are kernels that do not come through torch's dispatcher: compiled by inductor, launched by Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .graph_backend import Cost, Recording, check_input
from .torch_private import Unfit

T = TypeVar("T")
aten = torch.ops.aten

# By name, as they are called from Python: some of them reach no operator on a CPU tensor.
READERS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "equal"}
READERS |= {"allclose", "unique_consecutive"}
READERS |= {"__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__contains__"}
READ_OPS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
FROM_HOST = {aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default, aten._pin_memory.default}


class CaptureError(RuntimeError):
    """What CUDA would have refused to capture, or to replay."""


class StandIn:
    """Captures on the CPU.

    Args:
        clock: iteration -> its Cost, instead of measuring it: there is no device to measure.
        free: bytes that ``free_bytes`` reports.
    Attributes:
        num_records, num_replays: how often these were called.
    """

    collectives = "gloo"

    def __init__(self, clock: Callable[[], Cost] | None = None, free: int = 2**40) -> None:
        self.device = torch.device("cpu")
        self._clock: Callable[[], Cost] = clock or (lambda: Cost(1.0, 0.1))
        self.free = free
        self.num_records = self.num_replays = 0

    def warm_up(self, body: Callable[[], T]) -> T:
        return body()

    def record(
        self, body: Callable[[], T], known: Iterable[Tensor], generators: Iterable[torch.Generator]
    ) -> tuple[Recording, T]:
        self.num_records += 1
        registered = list(generators)
        tape, states = Tape(known, registered), [g.get_state() for g in (torch.default_generator, *registered)]
        try:
            with _NoHost(), tape, _no_random_states():
                result = body()
        except CaptureError as error:
            raise Unfit(f"capturing raised {type(error).__name__}: {error}") from error
        finally:
            tape.undo()
            for generator, state in zip((torch.default_generator, *registered), states, strict=True):
                generator.set_state(state)
        if tape.num_bytes > self.free:
            raise torch.OutOfMemoryError(f"the stand-in has {self.free} bytes, the body wants {tape.num_bytes}")
        return TapeRecording(tape, self), result

    def static(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)

    def copy_in(self, static: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        for to, tensor in zip(static, given, strict=True):
            check_input(to, tensor)
            to.copy_(tensor)

    def send(self, target: Tensor, values: Sequence[float]) -> None:
        target.copy_(torch.tensor(values, dtype=torch.float64))

    def measure(self, iteration: Callable[[], None], expected_s: float) -> Cost:
        iteration()
        return self._clock()

    def free_bytes(self) -> int:
        return self.free

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)


class TapeRecording:
    """Operations that were noted. They hold all memory that they use, as a pool does."""

    def __init__(self, tape: Tape, backend: StandIn) -> None:
        self._tape: Tape | None = tape
        self._backend = backend
        self.num_bytes = tape.num_bytes

    def replay(self) -> None:
        if self._tape is None:
            raise CaptureError("the graph was freed, and is replayed")
        self._backend.num_replays += 1
        self._tape.run()

    def free(self) -> None:
        self._tape = None


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations while it is entered.

    Args:
        known: tensors that stand for memory on the device.
        generators: that are registered.
    Attributes:
        num_bytes: of all memory that the operations made.
    """

    def __init__(self, known: Iterable[Tensor], generators: Sequence[torch.Generator]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        everyone: tuple[Any, ...] = (torch.default_generator, *generators)
        self._generators = {generator._cdata for generator in everyone}
        self._announced = [tensor for tensor in known if tensor.numel()]
        self._addresses = [tensor.data_ptr() for tensor in self._announced]
        self._known = {_memory(tensor): tensor.untyped_storage() for tensor in self._announced}
        self._made: dict[int, Any] = {}  # address -> storage, held so that no address is given out twice
        self._before: dict[int, tuple[Any, Any]] = {}  # what was written to -> (storage, what it held)
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None], bool]] = []
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READ_OPS:
            raise CaptureError("a value is read on the host; torch._assert_async checks one without waiting")
        if func in FROM_HOST or kwargs.get("pin_memory"):
            raise CaptureError("memory of the host is made in the step: a tensor of Python's values, or pinned memory")
        generator: Any = kwargs.get("generator")  # another Python object at each operation
        if generator is not None and generator._cdata not in self._generators:
            raise CaptureError("a generator draws that is not registered with the graph")
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._check_known(func, tensor)
            if tensor.dtype in (torch.bool, torch.uint8) and func.__name__.startswith("index"):
                raise CaptureError("a value is read on the host: how many elements a mask selects")
        written = _written(func, args, kwargs)
        for tensor in written:
            self._keep(tensor)
        result = func(*args, **kwargs)
        outs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [out for out in outs if out.numel() and not any(_memory(out) == _memory(each) for each in given)]
        for out in fresh:
            if _memory(out) not in self._made:
                self._made[_memory(out)] = out.untyped_storage()
                self.num_bytes += out.untyped_storage().nbytes()
        if fresh or written or not outs or "c10d" in str(func):  # a view needs no run: it looks at the same memory
            noted = pytree.tree_map(_alias, (args, kwargs))
            places = [_alias(out) if any(out is each for each in fresh) else None for out in outs]
            self._operations.append((func, *noted, places, torch.is_grad_enabled()))
        return result

    def _check_known(self, func: Any, tensor: Tensor) -> None:
        if not tensor.numel() or _memory(tensor) in self._made or _memory(tensor) in self._known:
            return
        raise CaptureError(f"{func} takes a tensor {tuple(tensor.shape)} that is not on the device: a CPU tensor")

    def _keep(self, tensor: Tensor) -> None:
        address = _memory(tensor)
        if address in self._known and address not in self._before:
            storage: Any = tensor.untyped_storage()
            self._before[address] = storage, storage.clone()

    def undo(self) -> None:
        """A capture runs nothing: put back what the known memory held."""
        for storage, held in self._before.values():
            storage.copy_(held)
        self._before.clear()

    @torch.no_grad()
    def run(self) -> None:
        """All operations again, on the memory that they used."""
        for tensor, address in zip(self._announced, self._addresses, strict=True):
            if tensor.data_ptr() != address:
                raise CaptureError(f"a tensor {tuple(tensor.shape)} has moved since the capture; CUDA would not say so")
        for func, args, kwargs, places, for_backward in self._operations:
            torch.set_grad_enabled(for_backward)  # some keep more for a backward pass: oneDNN's LSTM
            result = func(*args, **kwargs)
            if not places:
                continue
            outs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            for place, out in zip(places, outs, strict=True):
                if place is not None:
                    place.copy_(out)


class _NoHost(TorchFunctionMode):
    """Refuses reads that reach no operator: ``tolist`` and ``numpy`` of a CPU tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READERS:
            raise CaptureError(f"{func.__name__}() reads the host; torch._assert_async checks without waiting")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_random_states() -> Iterator[None]:
    """Reading or setting a generator's state is refused, as CUDA does: torch's checkpoint does both."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CaptureError("a generator's state is read or set in the step, as activation checkpointing does")

    with contextlib.ExitStack() as stack:
        for home in (torch, torch.random):
            for name in ("get_rng_state", "set_rng_state", "manual_seed"):
                stack.enter_context(mock.patch.object(home, name, refuse))
        yield


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _alias(leaf: Any) -> Any:
    """The same memory, unknown to autograd: a replay counts no version, and stays where ``data`` is replaced later."""
    return leaf.data if isinstance(leaf, Tensor) else leaf


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments that the operation writes to."""
    if "batch_norm" in func.__name__:  # some write running statistics without their schema saying so
        return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.numel()]
    found: list[Any] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor) and leaf.numel()]
