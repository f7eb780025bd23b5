"""Recipe ``auto``: what is compiled beside the training, and whether it pays.

Another process compiles while the recipe below trains. What it made takes over at the boundary of an iteration, if it
saves more than ``GAIN`` of one, measured on a batch of the run, on copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .background import Job, whole_order

GAIN = 0.05  # what a graph has to save of an iteration before it takes over
MEASURED = 5  # iterations of either kind that this is measured on


class Beside:
    """Graphs that are compiled elsewhere, by key, and the measure of the iterations meanwhile.

    Attributes:
        measured: the newest comparison, in words; "" before the first.
    """

    def __init__(self) -> None:
        self._jobs: dict[Any, Job | None] = {}  # None: it has ended
        self._below_s: list[float] = []  # how long the newest iterations on the recipe below took
        self.measured = ""

    def begin(self, key: Any, graph: GraphModule, args: Sequence[Tensor]) -> None:
        """Start compiling; raises what ``Job`` raises."""
        self._jobs[key] = Job(whole_order(graph, args))

    def knows(self, key: Any) -> bool:
        """Whether compiling was begun."""
        return key in self._jobs

    @property
    def compiling(self) -> bool:
        """Whether anything is being compiled, or has been and was not asked for since."""
        return any(job is not None for job in self._jobs.values())

    def poll(self, key: Any) -> str | None:
        """None while it is compiled; "" if nothing is (any more); or why that failed, once."""
        job = self._jobs.get(key)
        if job is None:
            return ""
        why = job.poll()
        if why is not None:
            self._jobs[key] = None
        return why

    def clock(self, below: Callable[[Any], None], runner: Any) -> None:
        """Run an iteration on the recipe below, and remember how long it took."""
        begin = time.perf_counter()
        below(runner)
        self._below_s = [*self._below_s[-7:], time.perf_counter() - begin]

    @property
    def has_clocked(self) -> bool:
        """Whether enough iterations were seen to compare with."""
        return len(self._below_s) >= MEASURED

    def pays(self, run: Callable[[list[Tensor]], Any], inputs: Sequence[Tensor]) -> bool:
        """Whether ``run`` saves more than ``GAIN`` of an iteration. It writes into ``inputs``; random state stays."""
        state, times = torch.get_rng_state(), []
        for _ in range(MEASURED):
            begin = time.perf_counter()
            run([*inputs])
            times.append(time.perf_counter() - begin)
        torch.set_rng_state(state)
        ours, below = min(times), min(self._below_s)
        self.measured = f"{ours * 1e6:.0f} us an iteration as a graph, {below * 1e6:.0f} on the recipe below"
        return ours <= (1 - GAIN) * below

    def explain(self) -> list[str]:
        return [self.measured] if self.measured else []

    def close(self) -> None:
        """End what is being compiled."""
        for job in self._jobs.values():
            if job is not None:
                job.close()
        self._jobs = {key: job for key, job in self._jobs.items() if job is None}
