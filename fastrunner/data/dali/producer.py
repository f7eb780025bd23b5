"""A DALI pipeline at work: a thread that feeds it, starts its runs, and takes its outputs, ahead of who wants them.

DALI's own threads do the work. This one needs the interpreter for some 0.1 ms a batch, which would otherwise be the
training thread's; that one only takes what is ready (4 us).
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter_ns
from typing import Any

from .augment import ERRORS
from .failures import Failures
from .feed import Batch, Feed, feed_all
from .runtime import to_torch

_live: weakref.WeakSet[Producer] = weakref.WeakSet()


class Producer:
    """Makes batches in order, from anywhere.

    Args:
        build: a new, built pipeline.
        feed: what goes in.
        finish: outputs of the pipeline as tensors -> what the loader hands over.
        failures: told of every run that fails; raises, or says which samples cannot be read.
        prefetch: batches that are being made or wait to be taken.
        stream: of a GPU, where the outputs will be used; its raw handle.
    Attributes:
        samples_fed: samples that the pipeline was given since this was made.
        wait_ns, num_waits: how long and how often a batch was waited for.
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
        self.samples_fed = self.wait_ns = self.num_waits = 0
        self._pid = os.getpid()
        self._pipe: Any = build()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._ready: SimpleQueue[Batch | BaseException] = SimpleQueue()
        self._running: deque[Batch] = deque()  # the pipeline works on them
        self._ahead = 0  # batches that were fed and not taken
        self._feeding = (0, 0)  # epoch and position of the batch to be fed next
        self._last_epoch = 0  # that may be fed
        self._wanted: tuple[int, int] | None = None  # the batch to be taken next
        _live.add(self)
        _close_at_exit()
        ERRORS.watch()

    def start(self, epoch: int, position: int, last_epoch: int) -> None:
        """Make that batch the next to be taken. What was made ahead stays, if it begins there."""
        if self._pid != os.getpid():
            raise RuntimeError("a DaliLoader works only in the process that started it, not in a child of that")
        self._last_epoch = last_epoch
        if self._wanted != (epoch, position) or self._thread is None:
            self._halt()
            self._wanted = self._feeding = (epoch, position)
            self._thread = threading.Thread(target=self._work, name="fastrunner-dali", daemon=True)
            self._thread.start()
        else:
            with self._changed:
                self._changed.notify()

    def take(self, last_epoch: int) -> dict[str, Any]:
        """The next batch, waiting for it where it is not ready.

        Raises:
            RuntimeError: it could not be made; the producer has stopped.
        """
        if self.num_ready:
            item = self._ready.get()
        else:
            begin = perf_counter_ns()
            item = self._ready.get()
            self.wait_ns += perf_counter_ns() - begin
            self.num_waits += 1
        if isinstance(item, BaseException):
            self._wanted = None
            raise item
        self._wanted = self._feed.after(item.epoch, item.position)
        with self._changed:
            self._ahead -= 1
            self._last_epoch = last_epoch
            self._changed.notify()
        return item.made

    @property
    def num_ready(self) -> int:
        """Batches that can be taken without waiting."""
        return self._ready.qsize()

    def close(self) -> None:
        """End the thread and the pipeline; called twice it does nothing."""
        self._halt()
        if self._pipe is not None:
            self._pipe = None  # a pipeline ends with its last reference
            ERRORS.leave()

    def _halt(self) -> None:
        """End the thread, and drop what was made ahead."""
        if self._pid != os.getpid():
            return  # the thread is the parent's
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread, self._wanted, self._stopping = None, None, False
        try:
            while self._running:
                self._running.popleft()
                self._pipe.share_outputs()
                self._pipe.release_outputs()
        except RuntimeError:  # a broken file in a batch that nobody will see; it is named when its turn comes
            self._running.clear()
            self._pipe = self._build()
        self._ready, self._ahead = SimpleQueue(), 0

    def _work(self) -> None:
        """The thread."""
        try:
            while self._wait():
                while self._may_feed():
                    self._feed_one()
                self._collect()
        except BaseException as error:
            self._ready.put(error)

    def _wait(self) -> bool:
        """Until there is something to do; False: stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._running or self._may_feed())
            return not self._stopping

    def _may_feed(self) -> bool:
        # another executor than DALI's default keeps outputs only until the next run
        room = self._ahead < self._prefetch and (self._pipe.exec_dynamic or not self._running)
        return room and self._feeding[0] <= self._last_epoch

    def _feed_one(self) -> None:
        """Give the pipeline its next batch to make."""
        batch = self._feed.batch(*self._feeding)
        self._feeding = self._feed.after(*self._feeding)
        feed_all(self._pipe, batch.rows)
        self._running.append(batch)
        self._pipe.schedule_run()
        with self._changed:
            self._ahead += 1
        self.samples_fed += len(batch.ids)

    def _collect(self) -> None:
        """Wait for the oldest run, and put what it made where it can be taken."""
        if not self._running:
            return
        try:
            outputs = self._pipe.share_outputs(cuda_stream=self._stream)
            tensors = [to_torch(output, copy=not self._pipe.exec_dynamic) for output in outputs]
            self._pipe.release_outputs()
        except RuntimeError as error:
            self._pipe = None  # a pipeline that has failed cannot go on
            self._recover(error)
            return
        silent = ERRORS.take()
        if silent is not None:
            for _ in range(len(self._running) - 1):
                self._pipe.share_outputs()
                self._pipe.release_outputs()
            self._recover(silent)
            return
        batch = self._running.popleft()
        batch.made = self._finish(tensors, batch)
        batch.rows = {}
        self._ready.put(batch)
        self._failures.made()

    def _recover(self, error: Exception) -> None:
        """Go on without the samples that cannot be made, where that is wanted; else raise."""
        suspects = list(self._running)
        self._running.clear()
        self._failures.failed(error, suspects, self._pipe)
        self._pipe = self._build() if self._pipe is None else self._pipe
        self._feeding = (suspects[0].epoch, suspects[0].position)
        with self._changed:
            self._ahead -= len(suspects)


@functools.cache
def _close_at_exit() -> None:
    """End the threads before DALI ends their pipelines: what is registered last, behind DALI's, is called first."""

    def close_all() -> None:
        for producer in list(_live):
            producer.close()

    atexit.register(close_all)
