"""What captures an iteration and replays it: CUDA, or on the CPU a stand-in (``graph_stand_in.py``) for tests.

    warm_up(body)    runs it beside the current stream, where libraries make their workspaces
    record(body)     runs none of it: the device's operations are noted, with the addresses that they read and write
    replay()         runs all of them again, on whatever lies at these addresses by then

So a body may neither read the host nor move: what changes from replay to replay has to be copied to where the first one
found it (``copy_in``, ``send``), in the stream of the replays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .torch_private import Unfit

T = TypeVar("T")

SLEEP_HZ = 2.0e9  # of the clock that torch.cuda._sleep counts; a faster one only shortens the wait
LEAST_SLEEP_S = 2e-3


class Cost(NamedTuple):
    """What an iteration cost that was not captured, in seconds.

    Attributes:
        host: until everything was launched.
        device: the same work, where nothing was waited for between two operations.
    """

    host: float
    device: float

    @property
    def launch_bound(self) -> float:
        """The share of the iteration in which the device waits for the host: what a replay would save of it."""
        whole = max(self.host, self.device)
        return (whole - self.device) / whole if whole > 0 else 0.0


class Recording(Protocol):
    """A captured body."""

    num_bytes: int  # that the pool grew by

    def replay(self) -> None:
        """Run it in the current stream. Returns before it has happened."""

    def free(self) -> None:
        """Give up the graph; its memory goes back to the pool."""


class GraphBackend(Protocol):
    """A device that captures. One object a model; the pool and the side stream are the process's.

    Attributes:
        device: of all static tensors.
        collectives: kind of process group whose collectives can be captured.
    """

    device: torch.device
    collectives: str

    def warm_up(self, body: Callable[[], T]) -> T:
        """Run ``body`` on the side stream; the current stream waits for it."""

    def record(
        self, body: Callable[[], T], known: Iterable[Tensor], generators: Iterable[torch.Generator]
    ) -> tuple[Recording, T]:
        """Capture ``body``, which must have been warmed up.

        Args:
            known: tensors on the device that it may use besides what it makes itself.
            generators: that it may draw from besides the default one.
        Returns:
            The recording, and what ``body`` returned: tensors that hold nothing before the first replay.
        Raises:
            Unfit: something in it cannot be captured; with the error of the backend as its cause.
            torch.OutOfMemoryError: the pool cannot grow that far.
        """

    def static(self, like: Tensor) -> Tensor:
        """Memory for an input: the shape, strides and dtype of ``like``, on the device, outside of the pool."""

    def copy_in(self, static: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Put a batch where the recording reads it, in the current stream, without waiting.

        Raises:
            ValueError: a shape or dtype is not the static input's.
        """

    def send(self, target: Tensor, values: Sequence[float]) -> None:
        """Write host numbers to a 1-D float64 tensor, in the current stream, without waiting."""

    def measure(self, iteration: Callable[[], None], expected_s: float) -> Cost:
        """Run an iteration that is not captured, and say what it cost. Waits for the device.

        Args:
            expected_s: how long the host needs for it, roughly.
        """

    def free_bytes(self) -> int:
        """Memory of the device that nobody has."""

    def random_state(self) -> Tensor:
        """State of the default generators that a body may draw from: uint8, on the CPU. Waits for the device."""

    def set_random_state(self, state: Tensor) -> None:
        """Put back what ``random_state`` gave."""


class Draws:
    """Where all generators stand that an iteration may draw from. Looking waits for the device.

    Args:
        backend: has the default ones.
        generators: others of the same device.
    """

    def __init__(self, backend: GraphBackend, generators: Sequence[torch.Generator]) -> None:
        self._backend, self.generators = backend, list(generators)

    def now(self) -> list[Tensor]:
        return [self._backend.random_state(), *(generator.get_state() for generator in self.generators)]

    def put_back(self, states: Sequence[Tensor]) -> None:
        self._backend.set_random_state(states[0])
        for generator, state in zip(self.generators, states[1:], strict=True):
            generator.set_state(state)


_SHARED: dict[int, tuple[Any, Any]] = {}  # index of a GPU -> its side stream, and its pool


def shared(device: torch.device) -> tuple[Any, Any]:
    """The process's one side stream and pool of a GPU, made once."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _SHARED:
        with torch.cuda.device(index):
            _SHARED[index] = torch.cuda.Stream(index), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
    return _SHARED[index]


class CudaRecording:
    """A ``torch.cuda.CUDAGraph``."""

    def __init__(self, graph: Any, num_bytes: int) -> None:
        self._graph, self.num_bytes = graph, num_bytes
        self.replay: Callable[[], None] = graph.replay

    def free(self) -> None:
        self._graph.reset()


class CudaBackend:
    """CUDA graphs on one GPU.

    Everything that a body allocates while it is captured comes from the one pool. Graphs may share it because none of
    them leaves anything there that is read after another one has run: results are copied out in the graph itself.
    """

    collectives = "nccl"

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = shared(device)
        self.device = torch.device("cuda", self._stream.device.index)

    def warm_up(self, body: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = body()
        current.wait_stream(self._stream)
        return result

    def record(
        self, body: Callable[[], T], known: Iterable[Tensor], generators: Iterable[torch.Generator]
    ) -> tuple[Recording, T]:
        graph: Any = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        current = torch.cuda.current_stream(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        try:
            # thread_local: loaders pin memory in threads of their own, which a "global" capture would forbid.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = body()
        except Exception as error:
            graph.reset()
            first = _first(error)
            if isinstance(first, (Unfit, torch.OutOfMemoryError)):
                raise first from None
            raise Unfit(f"capturing raised {type(first).__name__}: {_first_line(first)}") from first
        finally:
            torch.cuda.set_stream(current)  # torch leaves the side stream current where ending the capture fails
        return CudaRecording(graph, torch.cuda.memory_reserved(self.device) - before), result

    def static(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)

    def copy_in(self, static: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        for to, tensor in zip(static, given, strict=True):
            check_input(to, tensor)
            if to.data_ptr() != tensor.data_ptr():
                to.copy_(tensor, non_blocking=True)

    def send(self, target: Tensor, values: Sequence[float]) -> None:
        # Fresh pinned memory each time: torch gives it out again only when the copy has read it. One place, written
        # again while an earlier copy waits its turn, would change what an earlier replay sees.
        host = torch.empty(len(values), dtype=torch.float64, device="cpu", pin_memory=True)
        host.numpy()[:] = values
        target.copy_(host, non_blocking=True)

    def measure(self, iteration: Callable[[], None], expected_s: float) -> Cost:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The device is kept busy while the host launches, so that no wait for the host lies between the two events.
        torch.cuda._sleep(int(max(2 * expected_s, LEAST_SLEEP_S) * SLEEP_HZ))  # type: ignore[no-untyped-call]
        start.record()
        begin = time.perf_counter()
        iteration()
        host = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return Cost(host, start.elapsed_time(end) / 1e3)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def random_state(self) -> Tensor:
        return torch.cat([torch.cuda.get_rng_state(self.device), torch.get_rng_state()])

    def set_random_state(self, state: Tensor) -> None:
        length = len(torch.cuda.get_rng_state(self.device))
        torch.cuda.set_rng_state(state[:length], self.device)
        torch.set_rng_state(state[length:])


def check_input(static: Tensor, given: Tensor) -> None:
    """Raise ValueError where ``given`` cannot take the static input's place: ``copy_`` would stretch or convert it."""
    if given.shape != static.shape or given.dtype != static.dtype:
        raise ValueError(
            f"a static input is {static.dtype} {tuple(static.shape)}, got {given.dtype} {tuple(given.shape)}; "
            "another shape takes a graph of its own"
        )


def _first(error: BaseException) -> BaseException:
    """The error behind those that ending a broken capture raises."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
