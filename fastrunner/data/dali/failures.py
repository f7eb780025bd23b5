"""Which sample made a pipeline fail.

DALI says what went wrong, not with which sample, and its pipeline ends. So each suspect is tried alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
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
        policy: "raise", or "skip": leave unreadable samples out, and say so in the log.
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
        """Find the samples that fail when they are alone, and leave them out.

        Args:
            pipe: a pipeline that still works, where there is one.
        Raises:
            RuntimeError: the policy is "raise", or no sample fails alone, or all of them do. It names the sample.
        """
        tried = failed = 0
        bad: dict[int, str] = {}
        for index, why in self._try_each(suspects, pipe):
            tried += 1
            if why is None:
                continue
            failed += 1
            bad[index] = why
            if self._policy == "raise":
                what = "cannot read" if isinstance(error, RuntimeError) else "an augmentation fails on"
                raise RuntimeError(f"{what} {self._name(index)}: {why}; remove or replace it") from error
            if failed == tried and self._in_a_row + failed >= _TOO_MANY:
                raise RuntimeError(f"the pipeline fails on every sample, such as {self._name(index)}: {why}") from error
        if not bad:
            raise RuntimeError(
                f"the pipeline failed, though each of its {tried} samples can be made alone: {reason(error)}"
            ) from error
        self._in_a_row = self._in_a_row + failed if failed == tried else 0
        self._leave_out(bad)

    def _leave_out(self, bad: dict[int, str]) -> None:
        for index, why in bad.items():
            self._feed.unreadable[index] = why
            _logger.warning(
                f"skipped {self._name(index)}: {why}; {len(self._feed.unreadable)} unreadable of "
                f"{self._feed.order.num_samples} samples so far"
            )

    def _try_each(self, suspects: Sequence[Batch], pipe: Any) -> Iterator[tuple[int, str | None]]:
        """(sample id, why it fails or None) of all samples, each alone."""
        for batch in suspects:
            for index in batch.ids.tolist():
                pipe = self._build() if pipe is None else pipe
                try:
                    feed_all(pipe, self._feed.single(batch.epoch, index))
                    pipe.schedule_run()
                    pipe.outputs()
                    error: BaseException | None = ERRORS.take()
                except Exception as failure:
                    error, pipe = failure, None  # a pipeline that has failed cannot go on
                file = None if self._files is None else self._files[index]
                yield index, None if error is None else reason(error, file)

    def _name(self, index: int) -> str:
        return f"sample {index}" if self._files is None else f"{self._files[index]} (sample {index})"
