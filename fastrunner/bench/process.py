"""A runner's process, and a deadline for each of its answers."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from .runners import GET

LOOK_S = 0.5  # between two looks at whether the process still lives
END_S = 3.0  # for a process to end by itself: its loader's workers and its compilers end with it


class Failed(RuntimeError):
    """A case cannot go on; the message is for its row."""


class Process:
    """A worker that takes orders and gives answers, a line of JSON each; what it prints goes to ``folder``.

    Args:
        python: the interpreter of its environment.
        spec: what ``worker.Worker`` takes.
        folder: of its own.
    """

    def __init__(self, python: str, spec: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self._errors = (folder / "output.txt").open("wb")
        root = str(Path(__file__).resolve().parents[2])
        start = f"import sys; sys.path.append({root!r}); from fastrunner.bench.worker import main; main()"
        self._process = subprocess.Popen(
            [python, "-c", start, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=os.getcwd(),
            start_new_session=True,  # what it starts can be ended with it
        )

    def ask(self, do: str, timeout_s: float, **order: Any) -> dict[str, Any]:
        """Send an order, wait for its answer.

        Raises:
            Failed: it answers with an error, ends, or does not answer in time (then it is ended).
        """
        self.send(do, **order)
        return self.answer(timeout_s)

    def send(self, do: str, **order: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None

    def answer(self, timeout_s: float) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        until = monotonic() + timeout_s
        while not select.select([pipe], [], [], min(LOOK_S, max(0.0, until - monotonic())))[0]:
            if self._process.poll() is not None:  # its children may hold the pipe open
                raise Failed(self._last_words())
            if monotonic() >= until:
                self.close(wait_s=0.0)
                raise Failed(f"it hung: no answer in {timeout_s:.0f} s")
        line = pipe.readline()
        if not line:
            raise Failed(self._last_words())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Failed(f"not installed; get it with: {GET}" if found.get("missing") else found["error"])
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = (self.folder / "output.txt").read_text(errors="replace").strip().splitlines()
        return f"it crashed (exit code {code})" + (f": {lines[-1]}" if lines else "")

    def dismiss(self) -> None:
        """Tell it to end."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what was still to be written has no reader
                self._process.stdin.close()

    def close(self, wait_s: float = END_S) -> None:
        """Tell it to end, end it if it has not after a while, and what it has started; wait until it has ended."""
        self.dismiss()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()
