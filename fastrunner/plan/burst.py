"""Several iterations in one call, where the step can do that and nobody needs Python in between: a burst.

Rule 9: a burst ends before the next due point, with the batches that lie ready, with the rows of the lr table, and
before 20 ms are over, since Ctrl-C is heard only by Python. Counters, log, lr and the place in the data are then as if
the iterations had been run one by one; those that were not run, of whatever cause, have left no trace.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lr_rows import LrRows

if TYPE_CHECKING:
    from ..data.loader import IterLoader
    from ..runner.base import BaseRunner
    from ..step.cudagraph import CudaGraphStep
    from ..step.graph import GraphStep
    from ..step.many import Many
    from .iteration import Terms
    from .run_plan import RunPlan

ROWS = 128  # iterations of a burst at most
FEWEST = 8  # and at least: fewer are as fast one by one
SECONDS = 0.02


class Bursts:
    """Bursts of the iterations in which nobody is called.

    Args:
        plan: says when somebody is.
        terms: timer and optimizer hook are lowered.
        graph: does the step.
    """

    def __init__(self, plan: RunPlan, terms: Terms, graph: GraphStep | CudaGraphStep) -> None:
        self._plan, self._terms, self._graph = plan, terms, graph
        self._fit = ROWS  # iterations that should fit into the time
        self._scalars = torch.empty(0, 0, dtype=torch.float64)
        self._same: tuple[list[float], Tensor] = ([], self._scalars)  # a row, and ROWS of it
        self.num_bursts = self.num_iters = 0

    def __call__(self, runner: BaseRunner, loader: IterLoader, iters: int, alone: bool) -> bool:
        """Run some iterations; False: none was, the next one has to be run by itself.

        Args:
            iters, alone: length of the workflow entry at hand, and whether it is the only one.
        Raises:
            RuntimeError: an iteration failed; those before it count.
        """
        count = self.length(runner, loader, self._fit if alone else min(self._fit, iters - runner._inner_iter))
        many = self._graph.many(runner._iter) if count >= FEWEST else None
        if many is None:
            return False
        batches: list[Any] = []
        results: list[tuple[int, Any, str]] = []
        rows = LrRows(self._plan, self._terms, runner)
        begin, fetched = time.perf_counter(), 0.0
        try:
            loader.take(batches, count)
            fetched = time.perf_counter()
            if not batches:  # what went wrong does so again at the loop's own next()
                return False
            same = rows.constant(many, len(batches))
            table = rows.table(many, len(batches)) if same is None else self._repeated(same)
            scalars = self._scalars_for(many)
            many.binding.forget_row()  # the burst writes there
            # Called and kept by C code: no signal is handled between the burst's end and the result being there.
            results.extend(map(many.burst, [batches], [table], [scalars]))
        finally:
            completed, outputs, why = results[0] if results else (0, None, "")
            if completed:
                self._count(runner, many, rows, completed, outputs, fetched, iters)
                self._fit = max(FEWEST, min(ROWS, int(SECONDS * completed / (time.perf_counter() - begin))))
            loader.give_back(batches[completed + bool(why) :])
        if why:
            rows.write(completed + 1)
            runner.data_batch = batches[completed]
            raise RuntimeError(why)
        return completed > 0

    def explain(self) -> str:
        """How many there were, in a line."""
        if not self.num_bursts:
            return f"none yet: {FEWEST} batches have to lie ready, and nobody be due for as many iterations"
        return f"{self.num_iters} iterations in {self.num_bursts} bursts of up to {ROWS}, between due points"

    def length(self, runner: BaseRunner, loader: IterLoader, most: int) -> int:
        """How many iterations may be run in one call."""
        now, end = runner._iter, runner._max_iters
        assert end is not None
        if self._plan.rewrites:
            return 0
        ema = self._terms.ema
        if ema is not None and ema.interval != 1:  # with the average or without it is another graph
            most = 0 if now % ema.interval == 0 else min(most, ema.interval - now % ema.interval)
        # The last one of a run leaves gradients behind, as the recipe below does.
        return min(most, ROWS, self._plan.next_due - now, end - 1 - now, loader.at_hand)

    def _count(
        self, runner: BaseRunner, many: Many, rows: LrRows, completed: int, outputs: Any, fetched: float, iters: int
    ) -> None:
        """Let the run be where it is by now."""
        timer = self._terms.timer
        assert timer is not None
        now = time.perf_counter()
        runner._iter += completed
        runner._inner_iter = (runner._inner_iter + completed - 1) % iters + 1
        many.ran(completed)
        rows.write(completed)
        runner.outputs = many.build(outputs)
        waited, took = (fetched - timer.t) / completed, (now - timer.t) / completed
        timer.t = now
        columns = self._scalars[:completed].T.tolist()
        built = many.build(columns)
        log_vars = {
            name: values if type(values) is list else [values] * completed for name, values in built["log_vars"].items()
        }
        norms = columns[-1] if many.clips else None
        runner.log_buffer.append_many(built["num_samples"], log_vars, waited, took, norms)
        self.num_bursts += 1
        self.num_iters += completed

    def _repeated(self, row: list[float]) -> Tensor:
        if row != self._same[0]:
            self._same = row, torch.tensor([row], dtype=torch.float64).repeat(ROWS, 1)
        return self._same[1]

    def _scalars_for(self, many: Many) -> Tensor:
        if self._scalars.shape[1] != many.num_outputs:
            self._scalars = torch.empty(ROWS, many.num_outputs, dtype=torch.float64)
        return self._scalars
