"""Which sample made a pipeline fail.

DALI says what went wrong, not with which sample, and its pipeline ends. So each suspect is tried alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from .augment import ERRORS
from .feed import Batch, Feed, feed_all
from .runtime import reason

_logger = logging.getLogger("fastrunner")

POLICIES = ("raise", "skip")
_TOO_MANY = 8  # failures in a row, without a single sample that works: it is the pipeline, not the files


class Failures:
    """What happens when a run of the pipeline fails.

    Args:
        policy: "raise" at the turn of the batch, or "skip": leave unreadable samples out, and say so in the log.
        build: a new pipeline for batches of one sample.
        feed: knows the inputs of a sample, and is told which cannot be read.
        files: sample id -> path; None: samples are no files.
    """

    def __init__(self, policy: str, build: Callable[[], Any], feed: Feed, files: Sequence[str] | None) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unreadable must be one of {', '.join(POLICIES)}, got {policy!r}")
        self._policy, self._build, self._feed, self._files = policy, build, feed, files
        self._in_a_row = 0

    def made(self) -> None:
        """A batch was made."""
        self._in_a_row = 0

    def failed(self, error: Exception, suspects: Sequence[Batch], pipe: Any = None) -> None:
        """Find the samples that fail when they are alone: leave them out, or let their batch fail at its turn.

        Args:
            pipe: a pipeline that still works, where there is one.
        Raises:
            RuntimeError: no sample fails alone, or all of them do.
        """
        tried = self._try_each(suspects, pipe)
        del pipe  # the traceback keeps this frame, and a pipeline keeps threads
        bad = [(batch, index, why) for batch, index, why in tried if why is not None]
        if not bad:
            raise RuntimeError(
                f"the pipeline failed, though each of its {len(tried)} samples can be made alone: {reason(error)}"
            ) from error
        batch, index, why = bad[0]
        if self._policy == "raise":
            what = "cannot read" if isinstance(error, RuntimeError) else "an augmentation fails on"
            failure = RuntimeError(f"{what} {self._name(index)}: {why}; remove or replace it")
            failure.__cause__ = error
            self._feed.doomed[batch.epoch, batch.position] = failure
            return
        self._in_a_row = self._in_a_row + len(tried) if len(bad) == len(tried) else 0
        if self._in_a_row >= _TOO_MANY:
            raise RuntimeError(f"the pipeline fails on every sample, such as {self._name(index)}: {why}") from error
        self._leave_out({index: why for _, index, why in bad})

    def _leave_out(self, bad: dict[int, str]) -> None:
        for index, why in bad.items():
            self._feed.unreadable[index] = why
            _logger.warning(
                f"skipped {self._name(index)}: {why}; {len(self._feed.unreadable)} unreadable of "
                f"{self._feed.order.num_samples} samples so far"
            )

    def _try_each(self, suspects: Sequence[Batch], pipe: Any) -> list[tuple[Batch, int, str | None]]:
        """(batch, sample id, why it fails or None) of each sample alone; with "raise" up to the first that fails."""
        tried: list[tuple[Batch, int, str | None]] = []
        for batch, index in [(one, index) for one in suspects for index in one.ids.tolist()]:
            pipe = self._build() if pipe is None else pipe
            try:
                feed_all(pipe, self._feed.single(batch.epoch, index))
                pipe.schedule_run()
                pipe.outputs()
                error: BaseException | None = ERRORS.take()
            except Exception as failure:
                # A pipeline that has failed cannot go on; DALI's frames would keep it, and its threads.
                error, pipe = failure.with_traceback(None), None
            file = None if self._files is None else self._files[index]
            tried.append((batch, index, None if error is None else reason(error, file)))
            hopeless = len(tried) >= _TOO_MANY and all(why is not None for _, _, why in tried)
            if error is not None and (self._policy == "raise" or hopeless):
                break
        return tried

    def _name(self, index: int) -> str:
        return f"sample {index}" if self._files is None else f"{self._files[index]} (sample {index})"
