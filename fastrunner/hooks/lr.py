"""Learning-rate hooks: the base, and the policies that are one formula. The formulas are in ``optim.schedule``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..optim.schedule import (
    annealing_cos,
    annealing_linear,
    cosine_restart_value,
    cosine_value,
    exp_value,
    flat_cosine_value,
    get_position_from_periods,
    inv_value,
    linear_value,
    next_step,
    poly_value,
    step_value,
    warmup_factor,
)
from ..registry import HOOKS
from .hook import NEVER
from .policy import PolicyHook, format_param, per_optimizer, pure
from .policy_checks import check_numbers, check_one_of, check_share, check_steps

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

__all__ = [  # MMCV has these functions beside its hooks
    "CosineAnnealingLrUpdaterHook",
    "CosineRestartLrUpdaterHook",
    "ExpLrUpdaterHook",
    "FixedLrUpdaterHook",
    "FlatCosineAnnealingLrUpdaterHook",
    "InvLrUpdaterHook",
    "LinearAnnealingLrUpdaterHook",
    "LrUpdaterHook",
    "PolyLrUpdaterHook",
    "StepLrUpdaterHook",
    "annealing_cos",
    "annealing_linear",
    "format_param",
    "get_position_from_periods",
]


class LrUpdaterHook(PolicyHook):
    """Base of the policies; subclasses give ``get_lr(runner, base_lr)``.

    Args:
        by_epoch: the policy counts epochs, and acts when one starts; otherwise it acts at every iteration.
        warmup: None, "constant", "linear" or "exp"; always counted in iterations from the very first.
        warmup_iters: its length, in iterations (epochs with ``warmup_by_epoch``).
        warmup_ratio: it starts at this share of the policy's value; in (0, 1].
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown warmup, or one with no length or a ratio outside (0, 1].
    """

    def __init__(
        self,
        by_epoch: bool = True,
        warmup: str | None = None,
        warmup_iters: int = 0,
        warmup_ratio: float = 0.1,
        warmup_by_epoch: bool = False,
    ) -> None:
        super().__init__(by_epoch, warmup, warmup_iters, warmup_ratio)
        self.warmup_by_epoch = warmup_by_epoch
        self.warmup_epochs = warmup_iters if warmup_by_epoch else None
        if warmup_by_epoch:
            self.warmup_iters = None
        self.base_lr: Any = []  # of each param group; dict optimizers: name -> list
        self.regular_lr: Any = []  # without warm-up

    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define get_lr(runner, base_lr)")

    def get_regular_lr(self, runner: BaseRunner) -> Any:
        """The policy's value for each param group."""
        return self._values(self.get_lr, runner, self.base_lr)

    def get_warmup_lr(self, cur_iters: int) -> Any:
        """``regular_lr`` as warm-up has it at this iteration."""
        assert self.warmup is not None
        factor = warmup_factor(self.warmup, cur_iters, self._warmup_length(), self.warmup_ratio)
        if isinstance(self.regular_lr, dict):
            return {name: [lr * factor for lr in lrs] for name, lrs in self.regular_lr.items()}
        return [lr * factor for lr in self.regular_lr]

    def _set_lr(self, runner: BaseRunner, lr_groups: Any) -> None:
        def write(optimizer: Any, lrs: list[float]) -> None:
            for group, lr in zip(optimizer.param_groups, lrs, strict=False):  # groups added later keep their own lr
                group["lr"] = lr

        if isinstance(runner.optimizer, dict):
            for name, optimizer in runner.optimizer.items():
                write(optimizer, lr_groups[name])
        else:
            write(runner.optimizer, lr_groups)

    def _evaluate(self, runner: BaseRunner) -> None:
        self.regular_lr = self.get_regular_lr(runner)

    def _write(self, runner: BaseRunner, warmup_at: int | None = None) -> None:
        self._set_lr(runner, self.regular_lr if warmup_at is None else self.get_warmup_lr(warmup_at))

    def before_run(self, runner: BaseRunner) -> None:
        """Take the base lr of each group: ``initial_lr``, or where there is none ``lr``, which becomes it.

        A resumed optimizer brings the ``initial_lr`` of its first run, which then wins over the config's lr.
        """
        super().before_run(runner)

        def base(_: str, optimizer: Any) -> list[float]:
            return [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]

        self.base_lr = per_optimizer(runner.optimizer, base)
        self._start(runner)

    def _start(self, runner: BaseRunner) -> None:
        """Nothing of an earlier run of this object stays."""
        self.regular_lr = per_optimizer(runner.optimizer, lambda *_: [])
        if self.warmup_by_epoch:
            self.warmup_iters = None

    def before_train_epoch(self, runner: BaseRunner) -> None:
        if self.warmup_iters is None:
            assert self.warmup_epochs is not None
            self.warmup_iters = self.warmup_epochs * len(runner.data_loader)
        super().before_train_epoch(runner)


@HOOKS.register_module()
class FixedLrUpdaterHook(LrUpdaterHook):
    """The base lr throughout; useful for its warm-up."""

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return base_lr

    def _next_change(self, cur_iter: int) -> int:
        return NEVER


@HOOKS.register_module()
class StepLrUpdaterHook(LrUpdaterHook):
    """``base * gamma**n``.

    Args:
        step: an int (n grows every ``step``), or a list of ints (n grows at each of them).
        gamma: the factor.
        min_lr: lower bound of the result.
    Raises:
        TypeError: ``step`` is neither an int nor a list.
        ValueError: ``step`` is not positive.
    """

    def __init__(self, step: int | list[int], gamma: float = 0.1, min_lr: float | None = None, **kwargs: Any) -> None:
        check_steps(step)
        check_numbers(gamma=gamma, **({} if min_lr is None else {"min_lr": min_lr}))
        self.step, self.gamma, self.min_lr = step, gamma, min_lr
        super().__init__(**kwargs)

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return step_value(base_lr, self._progress(runner), self.step, self.gamma, self.min_lr)

    def _next_change(self, cur_iter: int) -> int:
        return next_step(cur_iter, self.step)


@HOOKS.register_module()
class ExpLrUpdaterHook(LrUpdaterHook):
    """``base * gamma**progress``."""

    def __init__(self, gamma: float, **kwargs: Any) -> None:
        check_numbers(gamma=gamma)
        self.gamma = gamma
        super().__init__(**kwargs)

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return exp_value(base_lr, self._progress(runner), self.gamma)


@HOOKS.register_module()
class PolyLrUpdaterHook(LrUpdaterHook):
    """``(base - min_lr) * (1 - progress / length)**power + min_lr``."""

    def __init__(self, power: float = 1.0, min_lr: float = 0.0, **kwargs: Any) -> None:
        check_numbers(power=power, min_lr=min_lr)
        self.power, self.min_lr = power, min_lr
        super().__init__(**kwargs)

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return poly_value(base_lr, self._progress(runner), self._length(runner), self.power, self.min_lr)


@HOOKS.register_module()
class InvLrUpdaterHook(LrUpdaterHook):
    """``base / (1 + gamma * progress)**power``."""

    def __init__(self, gamma: float, power: float = 1.0, **kwargs: Any) -> None:
        check_numbers(gamma=gamma, power=power)
        self.gamma, self.power = gamma, power
        super().__init__(**kwargs)

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return inv_value(base_lr, self._progress(runner), self.gamma, self.power)


class _AnnealingLrUpdaterHook(LrUpdaterHook):
    """Base of the policies with a target.

    Args:
        min_lr: the target; or
        min_lr_ratio: the target as a share of the base lr.
    Raises:
        ValueError: both, or neither.
    """

    def __init__(self, min_lr: float | None = None, min_lr_ratio: float | None = None, **kwargs: Any) -> None:
        check_one_of(min_lr=min_lr, min_lr_ratio=min_lr_ratio)
        self.min_lr, self.min_lr_ratio = min_lr, min_lr_ratio
        super().__init__(**kwargs)

    def _target(self, base_lr: float) -> float:
        if self.min_lr_ratio is not None:
            return base_lr * self.min_lr_ratio
        assert self.min_lr is not None
        return self.min_lr


@HOOKS.register_module()
class CosineAnnealingLrUpdaterHook(_AnnealingLrUpdaterHook):
    """Half a cosine to ``min_lr`` or ``min_lr_ratio`` of the base lr (one of the two), over the run."""

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return cosine_value(base_lr, self._target(base_lr), self._progress(runner), self._length(runner))


@HOOKS.register_module()
class LinearAnnealingLrUpdaterHook(_AnnealingLrUpdaterHook):
    """A line to ``min_lr`` or ``min_lr_ratio`` of the base lr (one of the two), over the run."""

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return linear_value(base_lr, self._target(base_lr), self._progress(runner), self._length(runner))


@HOOKS.register_module()
class FlatCosineAnnealingLrUpdaterHook(_AnnealingLrUpdaterHook):
    """The base lr for the first ``start_percent`` of the run (a float in [0, 1]), then half a cosine to the target."""

    def __init__(
        self,
        start_percent: float = 0.75,
        min_lr: float | None = None,
        min_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_share("start_percent", start_percent)
        self.start_percent = start_percent
        super().__init__(min_lr, min_lr_ratio, **kwargs)

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        progress, length = self._progress(runner), self._length(runner)
        return flat_cosine_value(base_lr, self._target(base_lr), progress, length, self.start_percent)


@HOOKS.register_module()
class CosineRestartLrUpdaterHook(_AnnealingLrUpdaterHook):
    """Half a cosine to the target in each period.

    Args:
        periods: lengths, in epochs or iterations; together at least the run.
        restart_weights: one a period, which starts at ``weight * base + (1 - weight) * target``.
    Raises:
        TypeError: these are not lists.
        ValueError: they differ in length, a period is not an int > 0, or (when a run starts) they end before it.
    """

    def __init__(
        self,
        periods: list[int],
        restart_weights: list[float] | tuple[float, ...] = (1,),
        min_lr: float | None = None,
        min_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("periods", periods), ("restart_weights", restart_weights)):
            if not isinstance(value, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {type(value).__name__}")
        if len(periods) != len(restart_weights):
            raise ValueError(
                f"each period needs a restart weight: there are {len(periods)} periods, {len(restart_weights)} weights"
            )
        if not all(isinstance(period, int) and period > 0 for period in periods):
            raise ValueError(f"periods must be ints > 0, got {periods}")
        check_numbers(**{f"restart_weights[{i}]": weight for i, weight in enumerate(restart_weights)})
        self.periods, self.restart_weights = periods, restart_weights
        self.cumulative_periods = [sum(periods[: i + 1]) for i in range(len(periods))]
        super().__init__(min_lr, min_lr_ratio, **kwargs)

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        length = runner.max_epochs if self.by_epoch else runner.max_iters
        if length is not None and sum(self.periods) < length:  # said now, and not in the middle of the run
            unit = "epochs" if self.by_epoch else "iterations"
            raise ValueError(f"periods={self.periods} are {sum(self.periods)} {unit}, but the run has {length}")

    @pure
    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return cosine_restart_value(
            base_lr,
            self._target(base_lr),
            self._progress(runner),
            self.periods,
            self.cumulative_periods,
            self.restart_weights,
        )
