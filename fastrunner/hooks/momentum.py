"""Momentum hooks: as the learning-rate hooks, for ``momentum`` or the first of ``betas``.

Warm-up divides, so that momentum starts high while the learning rate starts low.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..optim.schedule import cosine_value, linear_value, step_value, warmup_factor
from ..optim.schedule_phases import CyclePhase, cyclic_phases, cyclic_value, find_phase, one_cycle_ends
from ..registry import HOOKS
from .policy import PolicyHook, format_param, per_optimizer, pure
from .policy_checks import (
    check_anneal,
    check_by_iter,
    check_cycles,
    check_numbers,
    check_one_of,
    check_share,
    check_steps,
    check_target_ratio,
    cycle_length,
)

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

    Group = dict[str, Any]


def set_momentum(group: Group, value: float) -> None:
    """Write it where the group has it: ``momentum``, or the first of ``betas``; a group without either stays."""
    if "momentum" in group:
        group["momentum"] = value
    elif "betas" in group:
        group["betas"] = (value, group["betas"][1])


class MomentumUpdaterHook(PolicyHook):
    """Base of the policies; subclasses give ``get_momentum(runner, base_momentum)``.

    Args:
        by_epoch: the policy counts epochs, and acts when one starts; otherwise it acts at every iteration.
        warmup: None, "constant", "linear" or "exp"; always counted in iterations from the very first.
        warmup_iters: its length, in iterations.
        warmup_ratio: it starts at the policy's value divided by this; in (0, 1].
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown warmup, or one with no length or a ratio outside (0, 1]; when a run starts: a param group
            has neither ``momentum`` nor ``betas``.
    """

    what = "momentum"

    def __init__(
        self,
        by_epoch: bool = True,
        warmup: str | None = None,
        warmup_iters: int = 0,
        warmup_ratio: float = 0.9,
    ) -> None:
        super().__init__(by_epoch, warmup, warmup_iters, warmup_ratio)
        self.base_momentum: Any = []  # of each param group; dict optimizers: name -> list
        self.regular_momentum: Any = []  # without warm-up

    def get_momentum(self, runner: BaseRunner, base_momentum: Any) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define get_momentum(runner, base_momentum)")

    def get_regular_momentum(self, runner: BaseRunner) -> Any:
        """The policy's value for each param group."""
        return self._values(self.get_momentum, runner, self.base_momentum)

    def get_warmup_momentum(self, cur_iters: int) -> Any:
        """``regular_momentum`` as warm-up has it at this iteration."""
        assert self.warmup is not None
        factor = warmup_factor(self.warmup, cur_iters, self._warmup_length(), self.warmup_ratio)
        if isinstance(self.regular_momentum, dict):
            return {name: [value / factor for value in values] for name, values in self.regular_momentum.items()}
        return [value / factor for value in self.regular_momentum]

    def _set_momentum(self, runner: BaseRunner, momentum_groups: Any) -> None:
        def write(optimizer: Any, values: list[float]) -> None:
            for group, value in zip(optimizer.param_groups, values, strict=False):  # groups added later keep their own
                set_momentum(group, value)

        if isinstance(runner.optimizer, dict):
            for name, optimizer in runner.optimizer.items():
                write(optimizer, momentum_groups[name])
        else:
            write(runner.optimizer, momentum_groups)

    def _evaluate(self, runner: BaseRunner) -> None:
        self.regular_momentum = self.get_regular_momentum(runner)

    def _write(self, runner: BaseRunner, warmup_at: int | None = None) -> None:
        values = self.regular_momentum if warmup_at is None else self.get_warmup_momentum(warmup_at)
        self._set_momentum(runner, values)

    def before_run(self, runner: BaseRunner) -> None:
        """Take the base of each group: ``initial_momentum``, or where there is none its momentum, which becomes it."""
        super().before_run(runner)

        def base(name: str, optimizer: Any) -> list[float]:
            return [group.setdefault("initial_momentum", momentum_of(name, group)) for group in optimizer.param_groups]

        self.base_momentum = per_optimizer(runner.optimizer, base)
        self.regular_momentum = per_optimizer(runner.optimizer, lambda *_: [])


def momentum_of(name: str, group: Group) -> float:
    """Raises ValueError where there is none."""
    if "momentum" not in group and "betas" not in group:
        raise ValueError(
            f"the optimizer {name} has neither momentum nor betas in its param groups; drop momentum_config, "
            "or use an optimizer that has a momentum"
        )
    return float(group["momentum"] if "momentum" in group else group["betas"][0])


@HOOKS.register_module()
class StepMomentumUpdaterHook(MomentumUpdaterHook):
    """``base * gamma**n``.

    Args:
        step: an int (n grows every ``step``), or a list of ints (n grows at each of them).
        gamma: the factor.
        min_momentum: lower bound of the result.
    Raises:
        TypeError: ``step`` is neither an int nor a list.
        ValueError: ``step`` is not positive.
    """

    def __init__(
        self, step: int | list[int], gamma: float = 0.5, min_momentum: float | None = None, **kwargs: Any
    ) -> None:
        check_steps(step)
        check_numbers(gamma=gamma, **({} if min_momentum is None else {"min_momentum": min_momentum}))
        self.step, self.gamma, self.min_momentum = step, gamma, min_momentum
        super().__init__(**kwargs)

    @pure
    def get_momentum(self, runner: BaseRunner, base_momentum: float) -> float:
        return step_value(base_momentum, self._progress(runner), self.step, self.gamma, self.min_momentum)


class _AnnealingMomentumUpdaterHook(MomentumUpdaterHook):
    """Base of the policies with a target: ``min_momentum``, or ``min_momentum_ratio`` of the base (one of the two)."""

    def __init__(
        self, min_momentum: float | None = None, min_momentum_ratio: float | None = None, **kwargs: Any
    ) -> None:
        check_one_of(min_momentum=min_momentum, min_momentum_ratio=min_momentum_ratio)
        self.min_momentum, self.min_momentum_ratio = min_momentum, min_momentum_ratio
        super().__init__(**kwargs)

    def _target(self, base_momentum: float) -> float:
        if self.min_momentum_ratio is not None:
            return base_momentum * self.min_momentum_ratio
        assert self.min_momentum is not None
        return self.min_momentum


@HOOKS.register_module()
class CosineAnnealingMomentumUpdaterHook(_AnnealingMomentumUpdaterHook):
    """Half a cosine to ``min_momentum`` or ``min_momentum_ratio`` of the base (one of the two), over the run."""

    @pure
    def get_momentum(self, runner: BaseRunner, base_momentum: float) -> float:
        return cosine_value(base_momentum, self._target(base_momentum), self._progress(runner), self._length(runner))


@HOOKS.register_module()
class LinearAnnealingMomentumUpdaterHook(_AnnealingMomentumUpdaterHook):
    """A line to ``min_momentum`` or ``min_momentum_ratio`` of the base (one of the two), over the run."""

    @pure
    def get_momentum(self, runner: BaseRunner, base_momentum: float) -> float:
        return linear_value(base_momentum, self._target(base_momentum), self._progress(runner), self._length(runner))


@HOOKS.register_module()
class CyclicMomentumUpdaterHook(MomentumUpdaterHook):
    """In each cycle from the base to a low multiple of it, and back. It counts iterations.

    Args:
        target_ratio: multiples of the base at the turning point and at the end; a number x stands for (x, x / 1e5).
        cyclic_times: cycles in the run.
        step_ratio_up: share of the cycle before the turning point, in [0, 1).
        anneal_strategy: "cos" or "linear".
        gamma: each cycle goes only this share as far from the base as the one before.
    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; when a run starts: it has fewer
            iterations than cycles.
    """

    def __init__(
        self,
        by_epoch: bool = False,
        target_ratio: float | tuple[float, ...] = (0.85 / 0.95, 1.0),
        cyclic_times: int = 1,
        step_ratio_up: float = 0.4,
        anneal_strategy: str = "cos",
        gamma: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_by_iter("Cyclic", by_epoch)
        check_cycles(cyclic_times, step_ratio_up, gamma)
        self.target_ratio = check_target_ratio(target_ratio)
        self.cyclic_times, self.step_ratio_up, self.gamma = cyclic_times, step_ratio_up, gamma
        self.anneal_func = check_anneal(anneal_strategy)
        self.max_iter_per_phase = 0  # of a cycle; known when a run starts
        self.momentum_phases: list[CyclePhase] = []
        super().__init__(by_epoch, **kwargs)

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        self.max_iter_per_phase = cycle_length(self._length(runner), self.cyclic_times)
        self.momentum_phases = cyclic_phases(self.max_iter_per_phase, self.step_ratio_up, self.target_ratio)

    @pure
    def get_momentum(self, runner: BaseRunner, base_momentum: float) -> float:
        cycle, phases = self.max_iter_per_phase, self.momentum_phases
        return cyclic_value(base_momentum, self._progress(runner), cycle, phases, self.gamma, self.anneal_func)


@HOOKS.register_module()
class OneCycleMomentumUpdaterHook(MomentumUpdaterHook):
    """From ``max_momentum`` down to ``base_momentum`` while the lr rises, and back. It counts iterations.

    Both numbers are kept in the param groups under these names, and travel in the optimizer's state_dict.

    Args:
        base_momentum, max_momentum: a float, a list with one for each param group, or a dict: name of the
            optimizer -> either.
        pct_start: share of the way down, a float in [0, 1].
        anneal_strategy: "cos" or "linear".
        three_phase: back as fast as down; ``max_momentum`` for the rest.
    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; when a run starts: the numbers do not fit
            the param groups, the optimizer has no momentum, or the way down is a single iteration.
        KeyError: a dict without the optimizer's name.
    """

    def __init__(
        self,
        base_momentum: float | list[float] | dict[str, Any] = 0.85,
        max_momentum: float | list[float] | dict[str, Any] = 0.95,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        three_phase: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("by_epoch", False)
        check_by_iter("OneCycle", kwargs["by_epoch"])
        for name, value in (("base_momentum", base_momentum), ("max_momentum", max_momentum)):
            if not isinstance(value, (float, list, dict)):
                raise ValueError(f"{name} must be a float, a list or a dict, got {value!r}")
        check_share("pct_start", pct_start)
        self._base_momentum, self._max_momentum = base_momentum, max_momentum
        self.pct_start = pct_start
        self.anneal_func = check_anneal(anneal_strategy)
        self.three_phase = three_phase
        self.momentum_phases: list[tuple[float, str, str]] = []  # last iteration, keys of the values at both ends
        super().__init__(**kwargs)

    def before_run(self, runner: BaseRunner) -> None:
        """Make the phases, and put both momenta into the param groups, which start at ``max_momentum``."""
        self._check_optimizer(runner)
        ends = one_cycle_ends(self._length(runner), self.pct_start, self.three_phase)
        low, high = "base_momentum", "max_momentum"
        keys = [(high, low), (low, high), (high, high)][: len(ends)]
        self.momentum_phases = [(end, *both) for end, both in zip(ends, keys, strict=True)]

        def start(name: str, optimizer: Any) -> None:
            momentum_of(name, optimizer.defaults)  # before the first write
            lows = format_param(name, optimizer, self._base_momentum)
            highs = format_param(name, optimizer, self._max_momentum)
            for group, base, top in zip(optimizer.param_groups, lows, highs, strict=True):
                set_momentum(group, top)
                group["base_momentum"], group["max_momentum"] = base, top

        per_optimizer(runner.optimizer, start)
        self.regular_momentum = per_optimizer(runner.optimizer, lambda *_: [])

    @pure
    def get_momentum(self, runner: BaseRunner, param_group: Group) -> float:
        """The value for a group: unlike the other policies', it takes the group, or a dict with its two momenta."""
        index, share = find_phase(self._progress(runner), [end for end, *_ in self.momentum_phases])
        _, start, end = self.momentum_phases[index]
        return self.anneal_func(param_group[start], param_group[end], share)

    def get_regular_momentum(self, runner: BaseRunner) -> Any:
        if not getattr(self.get_momentum, "pure", False):  # somebody else's: it may read anything of the group
            groups = per_optimizer(runner.optimizer, lambda _, optimizer: optimizer.param_groups)
            return self._values(self.get_momentum, runner, groups)

        @pure
        def value(runner: BaseRunner, momenta: tuple[float, float]) -> float:
            return self.get_momentum(runner, {"base_momentum": momenta[0], "max_momentum": momenta[1]})

        pairs = per_optimizer(
            runner.optimizer,
            lambda _, optimizer: [(group["base_momentum"], group["max_momentum"]) for group in optimizer.param_groups],
        )
        return self._values(value, runner, pairs)
