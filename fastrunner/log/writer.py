"""Work on log lines that the training loop need not wait for: formatting, the console, files. One thread, in order."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Job = tuple[Callable[..., None], tuple[Any, ...]]


class LogWriter:
    """Runs jobs one after the other, in a thread of its own while ``deferring``, else at once.

    Nothing overtakes: whoever else logs through ``logger`` first waits for the jobs that were there before. A job that
    raises is raised to whoever comes next. The thread starts with the first deferred job and ends with ``close``.

    Attributes:
        deferring: nobody who runs between two logs can tell when a line was written.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.deferring = False
        self._logger = logger
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self._pid = 0  # of the process that the thread is in
        self._error: BaseException | None = None

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """Run ``job(*args)``, after the jobs before it.

        Raises: what an earlier job raised.
        """
        if not self.deferring:
            self.flush()
            job(*args)
            return
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fastrunner-log", daemon=True)
            self._thread.start()
            self._pid = os.getpid()
            self._logger.addFilter(self._in_order)
        with self._lock:
            self._waiting += 1
            self._idle.clear()
        self._jobs.put((job, args))

    def flush(self) -> None:
        """Wait until all jobs are done.

        Raises: what one of them raised.
        """
        if self._thread is None or threading.current_thread() is self._thread:
            return
        if self._waiting:
            self._idle.wait()
        self._raise()

    def close(self) -> None:
        """Finish all jobs and end the thread; jobs may come again afterwards.

        Raises: what a job raised.
        """
        if self._thread is not None:
            self._idle.wait()  # first: a job that logs has to know that it is in the thread
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()
            self._logger.removeFilter(self._in_order)
        self._raise()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, args = item
            try:
                job(*args)
            except BaseException as error:  # raised to the loop's thread
                self._error = self._error or error
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._idle.set()

    def _in_order(self, record: logging.LogRecord) -> bool:
        """A filter of the logger that keeps all records, behind the lines that were there before."""
        here = os.getpid() == self._pid and threading.current_thread() is not self._thread
        if self._waiting and here:  # a forked worker has no such thread, and would wait for ever
            self._idle.wait()
        return True

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
