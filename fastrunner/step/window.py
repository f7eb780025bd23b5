"""Gradients that add up over several iterations, as GradientCumulativeOptimizerHook wants it, where graphs do it.

    add:     sum_i += grad(loss / factor)_i                    all iterations of a window but its last
    update:  update with sum_i + grad(loss / factor)_i;  sum_i = 0

While graphs run, the sums are the parameters' ``.grad``, so that a checkpoint inside a window holds them and the recipe
below adds to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .binding import Binding
from .torch_private import Unfit

if TYPE_CHECKING:
    from ..hooks.optimizer_cumulative import GradientCumulativeOptimizerHook
    from ..runner.base import BaseRunner


class Window:
    """Which of a window's two graphs an iteration needs, and whose the gradients are.

    Args:
        hook: the lowered hook; it decides where windows end.
    """

    def __init__(self, hook: GradientCumulativeOptimizerHook) -> None:
        self._hook = hook
        self._binding: Binding | None = None  # whose sums are the parameters' gradients now
        self._empty = False  # they are zero: a window begins
        self._names: frozenset[str] | None = None

    def place(self, runner: BaseRunner) -> tuple[bool, float]:
        """Whether the iteration at hand ends its window, and what its loss is divided by."""
        return self._hook.place(runner)

    def expect(self, names: frozenset[str]) -> None:
        """Which parameters get gradients: the same in all graphs, since one may have to update what others summed.

        Raises:
            Unfit: others than in the graphs before.
        """
        if self._names is not None and names != self._names:
            raise Unfit("other parameters get gradients than for batches of another shape, while gradients add up")
        self._names = names

    def bind(self, binding: Binding) -> bool:
        """Let the sums of ``binding`` be the gradients; False where a parameter has one that no graph knows of.

        Cost: nothing where they are; else 0.5 us a parameter, and a copy where the recipe below began the window.
        """
        if self._binding is binding:
            return True
        assert self._names is not None
        params = [binding.params[each.name] for each in binding.trained]
        names = [each.name for each in binding.trained]
        if any(p.grad is not None and name not in self._names for p, name in zip(params, names, strict=True)):
            return False
        for name, param, total in zip(names, params, binding.sums, strict=True):
            if name not in self._names or param.grad is total:
                continue
            if param.grad is None:
                total.zero_()
            else:
                total.copy_(param.grad)
            param.grad = total
        self._binding, self._empty = binding, False
        return True

    def ran(self, runner_iter: int, ends: bool) -> None:
        """A graph has done an iteration."""
        self._empty = ends
        self._hook._seen_iters = runner_iter + 1

    def release(self) -> None:
        """Somebody may look: between windows there are no gradients."""
        if self._binding is not None and self._empty:
            for each in self._binding.trained:
                self._binding.params[each.name].grad = None
        self._binding = None
