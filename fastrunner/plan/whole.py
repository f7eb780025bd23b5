"""The iteration whose step is one call: forward, backward, clip, update and average in a graph (``step/graph.py``).

Only where no hook of a user's is called: a graph leaves no ``.grad`` and no loss to go back through. Where there
is no graph (yet), and in the last iteration of a run or of an epoch whose end a user's hook sees, the one below runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from .dispatch import HookPlan, is_logger

if TYPE_CHECKING:
    from ..runner.base import BaseRunner
    from ..step.cudagraph import CudaGraphStep
    from ..step.graph import GraphStep
    from .dispatch import Call, Calls
    from .iteration import Terms
    from .run_plan import RunPlan


def make_whole(
    plan: RunPlan, terms: Terms, graph: GraphStep | CudaGraphStep, below: Call, after: Calls = (), last: Calls = ()
) -> Call:
    """One iteration of ``runner.data_batch``.

    Args:
        terms: timer and optimizer hook are lowered.
        graph: does the step, or says that it does not.
        below: the iteration without it, its calls included.
        after, last: calls of this package's hooks ahead of the timer and behind it.
    """
    timer, clock = terms.timer, time.perf_counter
    assert timer is not None
    window, step = graph.window, cast("Callable[..., tuple[dict[str, Any], Any] | None]", graph)
    only_logs = all(map(is_logger, (*after, *last)))  # they do not look at what a graph relies on
    seen_end = not plan.only_ours(plan.after_train_epoch)

    def whole(runner: BaseRunner) -> None:
        if runner._iter >= plan.next_write:
            plan.write_policies(runner)
        waited = clock() - timer.t
        done = None
        if runner._iter + 1 != runner._length and not (seen_end and ends_epoch(runner)):
            if window is None:
                done = step(runner.data_batch, runner._iter)
            else:
                done = step(runner.data_batch, runner._iter, *window.place(runner))
        if done is None:
            return graph.around(below, runner)
        outputs, grad_norm = done
        runner.outputs = outputs
        now = clock()
        row = (outputs["num_samples"], outputs["log_vars"].copy(), waited, now - timer.t)
        if not after and not last:
            runner.log_buffer.append(row if grad_norm is None else (*row, grad_norm))
            timer.t = now
            return None
        return call_after(runner, row, grad_norm)

    def call_after(runner: BaseRunner, row: tuple[object, ...], grad_norm: object) -> None:
        if not only_logs:
            graph.doubt()
        runner._uncounted = "iter"
        if after:  # these see the log without the time, as in MMCV's order
            count, log_vars, waited, _ = row
            runner.log_buffer.append((1, {"data_time": waited}))
            runner.log_buffer.append((count, log_vars))
            if grad_norm is not None:
                runner.log_buffer.append((count, {"grad_norm": grad_norm}))
            HookPlan.fire(plan, after, runner)
            now = clock()
            runner.log_buffer.append((1, {"time": now - timer.t}))
        else:
            now = clock()
            runner.log_buffer.append(
                (*row[:3], now - timer.t) if grad_norm is None else (*row[:3], now - timer.t, grad_norm)
            )
        timer.t = now
        HookPlan.fire(plan, last, runner)
        runner._uncounted = ""

    return whole


def ends_epoch(runner: BaseRunner) -> bool:
    """Whether the iteration at hand is its epoch's last, in the epoch runner."""
    return runner._max_epochs is not None and runner._inner_iter + 1 == len(runner.data_loader)
