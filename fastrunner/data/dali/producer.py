"""A DALI pipeline at work: fed, run, and emptied, ahead of who wants its batches.

DALI's own threads do the work, but feeding them and taking their outputs needs the interpreter for some 0.07 ms a
batch. A thread does that during the step, so that the training thread only takes what is ready (3 us). Where there is
hardly a step, the training thread does it itself: handing over between threads would cost as much again.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from torch import Tensor

from ..ring import Stats
from .augment import ERRORS
from .failures import Failures
from .feed import Batch, Feed, feed_all
from .runtime import to_torch

_STEP_NS = 200_000  # a step that takes less than this leaves no time for another thread

_live: weakref.WeakSet[Producer] = weakref.WeakSet()


class Producer:
    """Makes batches in order, from anywhere.

    ``_work`` guards the pipeline and all that concerns it. ``_ready`` and ``_taken`` need no guard: they are written by
    one operation of the interpreter, or by the training thread alone.

    Args:
        build: a new, built pipeline.
        feed: what goes in.
        finish: outputs of the pipeline as tensors -> what the loader hands over.
        failures: told of every run that fails; raises, or says which samples cannot be made.
        prefetch: batches that are being made or wait to be taken.
        stream: of a GPU, where the outputs will be used; its raw handle.
    Attributes:
        samples_fed: samples that the pipeline was given since this was made.
        stats: how often and how long a batch was waited for.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        feed: Feed,
        finish: Callable[[list[Any], Batch], dict[str, Any]],
        failures: Failures,
        *,
        prefetch: int,
        stream: int | None = None,
    ) -> None:
        self._build, self._feed, self._finish, self._failures = build, feed, finish, failures
        self._prefetch, self._stream = prefetch, stream
        self.samples_fed, self.stats = 0, Stats()
        self._pid = os.getpid()
        self._pipe: Any = build()
        self._work = threading.Lock()
        self._asleep = threading.Lock()  # a flag: the thread waits for it to be released; cheaper than an Event
        self._asleep.acquire()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._error: BaseException | None = None  # of the thread
        self._busy = True  # the thread is to work; else the training thread does
        self._given_ns = 0  # when the last batch was given
        self._running: deque[Batch] = deque()  # the pipeline works on them
        self._ready: deque[Batch] = deque()
        self._lent: deque[list[Tensor]] = deque()  # aliases of what lies ready and of what was taken last, see _collect
        self._fed = self._taken = 0  # batches
        self._feeding = (0, 0)  # epoch and position of the batch to be fed next
        self._last_epoch = 0  # that may be fed
        self._wanted: tuple[int, int] | None = None  # the batch to be taken next
        _live.add(self)
        _close_at_exit()
        ERRORS.watch()

    def ready(self) -> int:
        """Batches that can be taken without waiting."""
        return len(self._ready)

    def start(self, epoch: int, position: int, last_epoch: int) -> None:
        """Make that batch the next to be taken. What was made ahead stays, if it begins there."""
        if self._pid != os.getpid():
            raise RuntimeError("a DaliLoader works only in the process that started it, not in a child of that")
        self._last_epoch = last_epoch
        if self._wanted != (epoch, position) or self._thread is None:
            self._halt()
            self._pipe = self._build() if self._pipe is None else self._pipe
            self._wanted = self._feeding = (epoch, position)
            self._busy, self._given_ns = True, 0
            self._thread = threading.Thread(target=self._run, name="fastrunner-dali", daemon=True)
            self._thread.start()
        self._wake()

    def take(self, last_epoch: int) -> dict[str, Any]:
        """The next batch, waiting for it where it is not ready.

        Args:
            last_epoch: whose batches may be made from now on.
        Raises:
            RuntimeError: it could not be made; the producer must be started again.
        """
        self._last_epoch = last_epoch
        begin = perf_counter_ns()
        self._busy = begin - self._given_ns > _STEP_NS
        stats, ready = self.stats, len(self._ready)
        if ready:
            batch = self._ready.popleft()
            self._taken += 1
            stats.ready += ready
        else:
            batch = self._wait()
            stats.waited += 1
            stats.waited_s += (perf_counter_ns() - begin) * 1e-9
        stats.batches += 1
        self._wanted = self._feed.after(batch.epoch, batch.position)
        if self._busy:
            self._wake()
        self._given_ns = perf_counter_ns()
        return batch.made

    def close(self) -> None:
        """End the thread and the pipeline; called twice it does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._thread is threading.current_thread():  # garbage is collected wherever it is found
            self._stopping = True  # the thread ends by itself, and what is left goes with it
        else:
            self._halt()
            self._pipe = None  # a pipeline ends with its last reference
        ERRORS.leave()

    def _wait(self) -> Batch:
        """The next batch where none is ready: made here, unless the thread is at it."""
        with self._work:
            while not self._ready:
                if self._error is not None:  # of a batch behind those that lay ready
                    raise self._error
                assert self._running or self._may_feed(), "a batch was asked for that must not be made yet"
                self._advance()
            batch = self._ready.popleft()
            self._taken += 1
            if not self._busy:
                try:
                    self._fill()
                except Exception as error:
                    self._error = error  # of a batch to come, not of this one
        return batch

    def _wake(self) -> None:
        if self._asleep.locked():  # only the training thread calls this, so that nobody else releases it in between
            self._asleep.release()

    def _run(self) -> None:
        """The thread."""
        while not self._stopping:
            self._asleep.acquire()
            while self._busy and not self._stopping:
                with self._work:
                    if not (self._running or self._may_feed()):
                        break
                    try:
                        self._advance()
                    except BaseException as error:
                        self._error = error
                        return

    def _advance(self) -> None:
        """Feed what may be fed, and take the oldest run's outputs."""
        self._fill()
        if self._running:
            self._collect()

    def _fill(self) -> None:
        while self._may_feed():
            self._feed_one()

    def _may_feed(self) -> bool:
        # another executor than DALI's default keeps outputs only until the next run
        room = self._fed - self._taken < self._prefetch and (self._pipe.exec_dynamic or not self._running)
        return room and self._feeding[0] <= self._last_epoch

    def _feed_one(self) -> None:
        """Give the pipeline its next batch to make."""
        batch = self._feed.batch(*self._feeding)
        self._feeding = self._feed.after(*self._feeding)
        self._running.append(batch)
        self._fed += 1
        if batch.error is None:
            feed_all(self._pipe, batch.rows)
            self._pipe.schedule_run()
            self.samples_fed += len(batch.ids)

    def _collect(self) -> None:
        """Wait for the oldest run, and put what it made where it can be taken."""
        failed = self._running[0].error
        if failed is not None:
            raise failed
        try:
            outputs = self._pipe.outputs(cuda_stream=self._stream)  # and the last run's are released
            tensors = [to_torch(output, copy=not self._pipe.exec_dynamic) for output in outputs]
        except RuntimeError as error:
            self._pipe = None  # a pipeline that has failed cannot go on
            self._recover(error.with_traceback(None))  # whose frames would keep the pipeline, and that its threads
            return
        silent = ERRORS.take()
        if silent is not None:
            self._drain(1)
            self._recover(silent)
            return
        batch = self._running.popleft()
        self._lend(tensors)
        batch.made = self._finish(tensors, batch)
        batch.rows = {}
        self._ready.append(batch)
        self._failures.made()

    def _lend(self, tensors: list[Any]) -> None:
        """Keep a batch's memory a little longer than its taker does, so that it is given back to the system here.

        That takes 2 ms now and then (glibc trims its heap), which the training thread would spend between two steps.
        Aliases are torch's, because torch frees without the GIL.
        """
        while len(self._lent) - len(self._ready) > 1:  # all that were taken but the last, which is in use
            self._lent.popleft()
        flat = [one for each in tensors for one in (each if isinstance(each, list) else [each])]
        self._lent.append([each.detach() for each in flat if not each.is_cuda])

    def _recover(self, error: Exception) -> None:
        """Start again with the oldest batch, now that it is known which samples cannot be made."""
        suspects = list(self._running)
        self._running.clear()
        self._failures.failed(error, suspects, self._pipe)
        self._pipe = self._build() if self._pipe is None else self._pipe
        self._feeding = (suspects[0].epoch, suspects[0].position)
        self._fed -= len(suspects)

    def _drain(self, first: int) -> None:
        """Wait for the runs from number ``first`` on, and drop what they made."""
        for batch in list(self._running)[first:]:
            if batch.error is None:
                self._pipe.outputs()

    def _halt(self) -> None:
        """End the thread, and drop what was made ahead."""
        if self._pid != os.getpid():
            return  # the thread is the parent's
        self._stopping = True
        self._wake()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._wanted, self._error, self._stopping = None, None, None, False
        try:
            self._drain(0)
        except RuntimeError:  # a broken file in a batch that nobody will see; it is named when its turn comes
            self._pipe = None
        ERRORS.take()  # nor will anybody see theirs
        self._running.clear()
        self._ready.clear()
        self._lent.clear()
        self._fed = self._taken = 0


@functools.cache
def _close_at_exit() -> None:
    """End the threads before DALI ends their pipelines: what is registered last, behind DALI's, is called first."""

    def close_all() -> None:
        for producer in list(_live):
            producer.close()

    atexit.register(close_all)
