"""The values that a burst's iterations have besides their batches: lr, momentum and what follows from them, a row each.

Policies are asked about iterations to come through a stand-in, so that the runner's counters and the optimizer's
``param_groups`` stay what they are until these iterations have been run.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hooks.hook import NEVER

if TYPE_CHECKING:
    from ..hooks.policy import PolicyHook
    from ..runner.base import BaseRunner
    from ..step.many import Many
    from .iteration import Terms
    from .run_plan import RunPlan


class LrRows:
    """Of the iterations from the one at hand on.

    Args:
        plan: knows when a policy may change its value next.
        terms: the policies, and the average.
        runner: as it is before these iterations.
    """

    def __init__(self, plan: RunPlan, terms: Terms, runner: BaseRunner) -> None:
        self._plan, self._terms, self._runner = plan, terms, runner
        self._first = runner._iter
        self._calls: list[tuple[int, PolicyHook]] = []  # (iteration, hook), in order
        self._asked: list[tuple[int, int]] = []  # (iteration, the next one at which a policy is due)

    def constant(self, many: Many, count: int) -> list[float] | None:
        """The row that all of ``count`` iterations have; None where theirs differ."""
        if self._plan.next_write < self._first + count or self._terms.ema is not None or many.binding.counts:
            return None
        return many.binding.values(self._runner.optimizer.param_groups, 0, None)

    def table(self, many: Many, count: int) -> Tensor:
        """float64 [count, width of the row]. Cost: a microsecond a row, and the policies' where they are due."""
        binding, ema = many.binding, copy.copy(self._terms.ema)  # a copy counts these iterations
        groups, first, next_write = self._runner.optimizer.param_groups, self._first, self._plan.next_write
        ahead = self._ahead()
        rows = []
        for number in range(count):
            now = ahead.iter = first + number
            if now >= next_write:
                next_write = self._ask(ahead)
                groups = ahead.optimizer.param_groups
            term = None if ema is None else ema.average_at(now)
            rows.append(binding.values(groups, number, None if term is None else float(term.momentum)))
        return torch.tensor(rows, dtype=torch.float64)

    def write(self, count: int) -> None:
        """The first ``count`` iterations were begun: let param groups and hooks be as they left them."""
        last = {id(hook): (at, hook) for at, hook in self._calls if at < self._first + count}
        if last:
            now = self._ahead(self._runner.optimizer)
            for at, hook in sorted(last.values(), key=lambda call: call[0]):
                now.iter = at
                hook.before_train_iter(now)
        for at, next_write in self._asked:
            if at < self._first + count:
                self._plan.next_write = next_write
        if self._terms.ema is not None:
            self._terms.ema.average_at(self._first + count - 1)

    def _ask(self, ahead: Any) -> int:
        """Call the policies that are due; the next iteration at which one is."""
        at = NEVER
        for hook in self._terms.policies:
            due = hook.due(ahead)
            if due <= ahead.iter:
                self._calls.append((ahead.iter, hook))
                hook.before_train_iter(ahead)
                due = ahead.iter + 1
            at = min(at, due)
        self._asked.append((ahead.iter, at))
        return at

    def _ahead(self, optimizer: Any = None) -> Any:
        """What policies look at of a runner, to be moved to other iterations."""
        runner = self._runner
        if optimizer is None:
            optimizer = SimpleNamespace(param_groups=[dict(group) for group in runner.optimizer.param_groups])
        return SimpleNamespace(
            iter=self._first,
            epoch=runner._epoch,
            max_iters=runner.max_iters,
            max_epochs=runner.max_epochs,
            data_loader=runner.data_loader,
            optimizer=optimizer,
        )
