"""Learning-rate hooks that go through a run in phases. The formulas are in ``optim.schedule_phases``."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from ..optim.schedule_phases import CyclePhase, cyclic_phases, cyclic_value, find_phase, one_cycle_ends
from ..registry import HOOKS
from .lr import LrUpdaterHook
from .policy import format_param, per_optimizer, pure
from .policy_checks import (
    check_anneal,
    check_by_iter,
    check_cycles,
    check_numbers,
    check_share,
    check_target_ratio,
    cycle_length,
)

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class CyclicLrUpdaterHook(LrUpdaterHook):
    """In each cycle from the base lr to a high multiple of it, and then to a low one. It counts iterations.

    Args:
        target_ratio: (high, low) multiples of the base lr; a number x stands for (x, x / 1e5).
        cyclic_times: cycles in the run.
        step_ratio_up: share of the cycle on the way up, in [0, 1).
        anneal_strategy: "cos" or "linear".
        gamma: each cycle goes only this share as far from the base lr as the one before; in (0, 1].
    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; when a run starts: it has fewer
            iterations than cycles.
    """

    def __init__(
        self,
        by_epoch: bool = False,
        target_ratio: float | tuple[float, ...] = (10, 1e-4),
        cyclic_times: int = 1,
        step_ratio_up: float = 0.4,
        anneal_strategy: str = "cos",
        gamma: float = 1,
        **kwargs: Any,
    ) -> None:
        check_by_iter("Cyclic", by_epoch)
        check_cycles(cyclic_times, step_ratio_up, gamma)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        self.target_ratio = check_target_ratio(target_ratio)
        self.cyclic_times, self.step_ratio_up, self.gamma = cyclic_times, step_ratio_up, gamma
        self.anneal_func = check_anneal(anneal_strategy)
        self.max_iter_per_phase = 0  # of a cycle; known when a run starts
        self.lr_phases: list[CyclePhase] = []
        super().__init__(by_epoch, **kwargs)

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        self.max_iter_per_phase = cycle_length(self._length(runner), self.cyclic_times)
        self.lr_phases = cyclic_phases(self.max_iter_per_phase, self.step_ratio_up, self.target_ratio)

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return cyclic_value(
            base_lr, self._progress(runner), self.max_iter_per_phase, self.lr_phases, self.gamma, self.anneal_func
        )


@HOOKS.register_module()
class OneCycleLrUpdaterHook(LrUpdaterHook):
    """From ``max_lr / div_factor`` up to ``max_lr``, and down to ``max_lr / div_factor / final_div_factor``.

    The same values as ``torch.optim.lr_scheduler.OneCycleLR``. It counts iterations, and does not look at the
    optimizer's own lr.

    Args:
        max_lr: a number, a list with one for each param group, or a dict: name of the optimizer -> either.
        total_steps: iterations of the cycle, at least those of the run; None: those of the run.
        pct_start: share of the way up, a float in [0, 1].
        anneal_strategy: "cos" or "linear".
        div_factor, final_div_factor: see above; > 0.
        three_phase: down to ``max_lr / div_factor`` as fast as up, and only then to the end.
    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; when a run starts: ``max_lr`` does not
            fit the param groups, ``total_steps`` is shorter than the run, or the way up is a single iteration.
        KeyError: ``max_lr`` is a dict without the optimizer's name.
    """

    def __init__(
        self,
        max_lr: float | list[float] | dict[str, Any],
        total_steps: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("by_epoch", False)
        check_by_iter("OneCycle", kwargs["by_epoch"])
        if not isinstance(max_lr, (numbers.Real, list, dict)):
            raise ValueError(f"max_lr must be a number, a list or a dict, got {max_lr!r}")
        if total_steps is not None and not isinstance(total_steps, int):
            raise ValueError(f"total_steps must be an int, got {total_steps!r}")
        check_share("pct_start", pct_start)
        check_numbers(div_factor=div_factor, final_div_factor=final_div_factor)
        if not min(div_factor, final_div_factor) > 0:
            raise ValueError(f"div_factor and final_div_factor must be > 0, got {div_factor} and {final_div_factor}")
        self._max_lr = max_lr
        self.total_steps = total_steps
        self.pct_start = pct_start
        self.anneal_func = check_anneal(anneal_strategy)
        self.div_factor, self.final_div_factor = div_factor, final_div_factor
        self.three_phase = three_phase
        self.lr_phases: list[tuple[float, float, float]] = []  # last iteration, multiples of base_lr at both ends
        super().__init__(**kwargs)

    def before_run(self, runner: BaseRunner) -> None:
        """Make the phases, and take ``max_lr / div_factor`` as base lr; ``initial_lr`` only where there is none."""
        self._check_optimizer(runner)
        max_iters = self._length(runner)
        total_steps = max_iters if self.total_steps is None else self.total_steps
        if total_steps < max_iters:
            raise ValueError(f"total_steps={total_steps} is less than the {max_iters} iterations of the run")

        def base(name: str, optimizer: Any) -> list[float]:
            lrs = [lr / self.div_factor for lr in format_param(name, optimizer, self._max_lr)]
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group.setdefault("initial_lr", lr)
            return lrs

        ends = one_cycle_ends(total_steps, self.pct_start, self.three_phase)
        high, low = self.div_factor, 1 / self.final_div_factor
        multiples = [(1, high), (high, 1), (1, low)] if self.three_phase else [(1, high), (high, low)]
        self.lr_phases = [(end, *both) for end, both in zip(ends, multiples, strict=True)]
        self.base_lr = per_optimizer(runner.optimizer, base)
        self._start(runner)

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        progress = self._progress(runner)
        if progress > self.lr_phases[-1][0]:
            raise ValueError(
                f"iteration {progress} is behind the cycle of {self.lr_phases[-1][0] + 1} iterations; "
                "give total_steps what the whole training needs"
            )
        index, share = find_phase(progress, [end for end, *_ in self.lr_phases])
        _, start, end = self.lr_phases[index]
        return self.anneal_func(base_lr * start, base_lr * end, share)
