"""Slots: memory that threads fill ahead of the step and that goes around.

    threads:  job -> a free slot -> fill(memory, job)          main thread:  take() -> the oldest job's batch

Batches come out in the order of their jobs, in the slot's own memory: nothing is copied. A slot is filled again when

- nobody holds its tensors any more. They are made by ``torch.from_numpy`` from the slot's arrays or from views of them.
  A storage holds what it was made from, and a view the array that has the memory, so reference counts tell. Whoever
  keeps batches (``list(loader)``) keeps them: a slot whose last but one batch is still held gets new memory, and the
  old goes to its holder.
- with pinned memory: what the current stream had queued when the next batch was asked for is done (an event). The
  filling thread waits for it, outside the GIL; the main thread does not.

``fill`` should leave the GIL for its heavy part, and soon: freeing a batch of tensors lets go of the GIL in the main
thread, which then waits for whoever took it. So what can be known before a slot is free belongs into the iteration over
the jobs, which runs ahead. What ``fill`` raises is raised by ``take`` when its turn comes.

Threads are woken by locks; nothing sleeps, and nothing spins. To wake one costs the main thread some 15 us, so it does
that for several slots at once: when only half of what can lie ready is left.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

Memory = dict[str, NDArray[Any]]  # its arrays do not own their memory, see allocate
Fill = Callable[[Memory, Any], Any]

HELD = 2  # batches that their taker may hold without costing new memory: the one in use, and the one before
_LOOK_S = 1.0  # how often a waiting take() looks whether there is still somebody to wait for


def allocate(shapes: Mapping[str, tuple[tuple[int, ...], DTypeLike]], *, pinned: bool = False) -> Memory:
    """Arrays of the given shapes and dtypes, each at a multiple of 64 bytes; page-locked with ``pinned``."""
    memory = {}
    for name, (shape, dtype) in shapes.items():
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = torch.empty(num_bytes + 64, dtype=torch.uint8, pin_memory=pinned).numpy()
        start = -raw.ctypes.data % 64
        memory[name] = raw[start : start + num_bytes].view(dtype).reshape(shape)  # base: raw, as of all views of it
    return memory


@dataclass
class Stats:
    """How well the threads kept up, since the ring was made.

    Attributes:
        batches: taken.
        waited: of them, those that were not there yet.
        waited_s: seconds that ``take`` waited in all.
        ready: batches that lay ready when one was asked for, summed over ``batches``; up to the number of slots.
    """

    batches: int = 0
    waited: int = 0
    waited_s: float = 0.0
    ready: int = 0


class _Slot:
    """Memory and its two locks, which are used as flags: whoever waits for one acquires it."""

    __slots__ = ("batch", "error", "event", "filled", "free", "memory")

    def __init__(self, memory: Memory, event: Any) -> None:
        self.memory = memory
        self.batch: Any = None
        self.error: BaseException | None = None
        self.event = event  # after which the memory may be written
        self.free, self.filled = threading.Lock(), threading.Lock()
        self.filled.acquire()

    def in_use(self) -> bool:
        for array in self.memory.values():  # noqa: SIM110  # a generator is slower with cold caches
            # References that are no batch's: of an array memory, this loop, and getrefcount's argument; of what has
            # the memory this array, and the argument.
            if sys.getrefcount(array) > 3 or sys.getrefcount(array.base) > 2:
                return True
        return False


class _Run:
    """One sequence of jobs, and the threads on it."""

    def __init__(self, jobs: Iterable[Any], slots: list[_Slot]) -> None:
        self.jobs = iter(jobs)
        self.number = 0  # of the job that comes next
        self.slots = slots
        self.lock = threading.Lock()
        self.stopping = False
        self.threads: list[threading.Thread] = []
        self.taken = 0
        self.ready: deque[None] = deque()  # one for each slot that is filled: counted without a lock
        self.held: deque[_Slot] = deque()  # taken and not free yet, the oldest first


class Ring:
    """See the top of this file.

    Args:
        make_memory: memory of one slot.
        fill: ``fill(memory, job)`` -> batch; called by the threads.
        num_threads: at least one.
        ahead: batches that may lie ready, besides one in the hands of each thread.
        pinned: the memory is page-locked, and copies out of it may still be under way when the next batch is asked for.
    """

    def __init__(
        self, make_memory: Callable[[], Memory], fill: Fill, *, num_threads: int, ahead: int = 2, pinned: bool = False
    ) -> None:
        self._run: _Run | None = None
        if num_threads < 1 or ahead < 1:
            raise ValueError(f"num_threads and ahead must be >= 1, got {num_threads} and {ahead}")
        self._make_memory, self._fill = make_memory, fill
        self.num_threads, self.num_slots, self.pinned = num_threads, num_threads + ahead + HELD, pinned
        self._few = (num_threads + ahead + 1) // 2  # so many ready batches or fewer: time to wake the threads
        self.stats = Stats()

    def start(self, jobs: Iterable[Any]) -> None:
        """Work on ``jobs`` from now on; what was made ahead of others is dropped."""
        old = self._end()
        slots = [_Slot(slot.memory, slot.event) for slot in old if not slot.in_use()]
        while len(slots) < self.num_slots:
            slots.append(_Slot(self._make_memory(), None))
        run = self._run = _Run(jobs, slots)
        for number in range(self.num_threads):
            name = f"fastrunner-ring-{number}"
            thread = threading.Thread(target=_work, args=(run, self._fill), name=name, daemon=True)
            run.threads.append(thread)
            thread.start()

    @property
    def num_ready(self) -> int:
        """Batches that can be taken without waiting."""
        run = self._run
        return 0 if run is None else len(run.ready)

    def take(self) -> Any:
        """The next batch, waiting for it where it must.

        Raises:
            RuntimeError: there is no next job, or the threads are gone.
            whatever ``fill`` or the iteration over the jobs raised.
        """
        run = self._run
        if run is None:
            raise RuntimeError("the ring is not started")
        if self.pinned:
            self._mark(run)
        stats, ready = self.stats, len(run.ready)
        if ready <= self._few:
            self._free(run)
        slot = run.slots[run.taken % self.num_slots]
        if not slot.filled.acquire(blocking=False):
            self._wait(run, slot)
        if slot.error is not None:
            raise slot.error
        stats.batches += 1
        stats.ready += ready
        run.taken += 1
        run.ready.popleft()
        run.held.append(slot)
        batch, slot.batch = slot.batch, None
        return batch

    def _wait(self, run: _Run, slot: _Slot) -> None:
        begin = perf_counter()
        while not slot.filled.acquire(timeout=_LOOK_S):
            if not any(thread.is_alive() for thread in run.threads) and slot.filled.locked():
                raise RuntimeError("the ring's threads have ended, and there is no further batch")
        self.stats.waited += 1
        self.stats.waited_s += perf_counter() - begin

    def _free(self, run: _Run) -> None:
        """Give back the slots that nobody holds any more, in order."""
        while run.held:
            slot = run.held[0]
            if slot.in_use():
                if len(run.held) <= HELD:
                    return
                slot.memory, slot.event = self._make_memory(), None  # its holder keeps the old
            run.held.popleft()
            slot.free.release()

    def _mark(self, run: _Run) -> None:
        """The batch in use is done with when the current stream has come here."""
        if self.pinned and run.held:
            run.held[-1].event = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

    def __del__(self) -> None:
        self._signal_end()  # without waiting: the collector may run in any thread

    def close(self) -> None:
        """End the threads and let go of the slots."""
        self._end()

    def _signal_end(self) -> _Run | None:
        run, self._run = self._run, None
        if run is not None:
            run.stopping = True
            for slot in run.slots:
                if slot.free.locked():
                    slot.free.release()
        return run

    def _end(self) -> list[_Slot]:
        run = self._signal_end()
        if run is None:
            return []
        self._mark(run)
        for thread in run.threads:
            thread.join()
        for slot in run.slots:
            slot.batch = slot.error = None
        return run.slots


def _work(run: _Run, fill: Fill) -> None:
    """A thread's life: take a job and its slot, fill it."""
    while True:
        # The slot belongs to the job under one lock: else a thread that is late would find its slot taken by the job
        # that comes a round later. Nobody is held up: slots are given back in order.
        with run.lock:
            slot = run.slots[run.number % len(run.slots)]
            try:
                job = next(run.jobs)
                error = None
            except StopIteration:
                return
            except BaseException as raised:
                job, error, run.jobs = None, raised, iter(())
            run.number += 1
            slot.free.acquire()
        if run.stopping:
            return
        try:
            if error is not None:
                raise error
            if slot.event is not None:
                slot.event.synchronize()
            slot.batch = fill(slot.memory, job)
        except BaseException as raised:  # it belongs to who takes the batch
            slot.error = raised
        run.ready.append(None)
        slot.filled.release()
        if slot.error is not None:
            return
