"""What lr and momentum policies share: when they act, the warm-up before, and one evaluation for equal param groups."""

from __future__ import annotations

import numbers
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

from ..optim.schedule import WARMUPS
from .hook import NEVER, Hook, warn_of_no_epochs
from .policy_checks import check_numbers

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


def pure(method: Method) -> Method:
    """Marks a ``get_lr`` or ``get_momentum`` that gives equal values for equal bases, whichever group asks.

    It is then called once for each distinct base. What a subclass or a user puts in its place does not carry the mark,
    and is called for every group.
    """
    method.pure = True  # type: ignore[attr-defined]
    return method


class PolicyHook(Hook):
    """Base of LrUpdaterHook and MomentumUpdaterHook, which give ``_evaluate`` and ``_write`` their MMCV names.

    Cost by iteration: the policy once for each distinct base, and a write to each param group. Comparing first, to
    write less, would cost as much as the write, and miss nothing else: a user's own write lasts until the next
    iteration, as in MMCV.
    """

    what = "lr"  # for messages
    warmup_iters: int | None

    def __init__(self, by_epoch: bool, warmup: str | None, warmup_iters: int, warmup_ratio: float) -> None:
        if warmup is not None:
            if warmup not in WARMUPS:
                raise ValueError(f"warmup must be None or one of {WARMUPS}, got {warmup!r}")
            if not isinstance(warmup_iters, int):
                raise TypeError(f"warmup_iters must be an int, got {warmup_iters!r}")
            if not warmup_iters > 0:
                raise ValueError(f"warmup={warmup!r} needs warmup_iters > 0, got {warmup_iters}")
            check_numbers(warmup_ratio=warmup_ratio)
            if not 0 < warmup_ratio <= 1:
                raise ValueError(f"warmup_ratio must be in (0, 1], got {warmup_ratio}")
        self.by_epoch = by_epoch
        self.warmup = warmup
        self.warmup_iters = warmup_iters
        self.warmup_ratio = warmup_ratio
        self._spreads: defaultdict[str | None, Spread] = defaultdict(Spread)  # one for each optimizer

    def _evaluate(self, runner: BaseRunner) -> None:
        """Work out the policy's values."""
        raise NotImplementedError

    def _write(self, runner: BaseRunner, warmup_at: int | None = None) -> None:
        """Write them to the param groups, as warm-up has them at this iteration if one is given."""
        raise NotImplementedError

    def before_run(self, runner: BaseRunner) -> None:
        """Raises RuntimeError without an optimizer; warns of a policy that no epoch will ever call."""
        self._check_optimizer(runner)
        warn_of_no_epochs(self, runner, f"the {self.what} will not change", "acts when an epoch starts")

    def _check_optimizer(self, runner: BaseRunner) -> None:
        if runner.optimizer is None:
            raise RuntimeError(
                f"{type(self).__name__} needs an optimizer; give the runner one, or register no {self.what}_config"
            )

    def before_train_epoch(self, runner: BaseRunner) -> None:
        if self.by_epoch:
            self._evaluate(runner)
            self._write(runner)

    def before_train_iter(self, runner: BaseRunner) -> None:
        cur_iter = runner.iter
        # As in MMCV, iteration warmup_iters is written also by epoch: the value of the epoch that warm-up ended in.
        left = 0 if self.warmup is None else self._warmup_length() - cur_iter
        if not self.by_epoch:
            self._evaluate(runner)
            self._write(runner, cur_iter if left > 0 else None)
        elif self.warmup is not None and left >= 0:
            self._write(runner, cur_iter if left > 0 else None)

    due_if_alone = True  # a user's hook may write to the same place

    def due(self, runner: BaseRunner) -> int:
        """During warm-up every iteration; then none by epoch, and by iteration those that change the value."""
        if self.warmup is not None and (self.warmup_iters is None or runner.iter <= self.warmup_iters):
            return runner.iter
        return NEVER if self.by_epoch else self._next_change(runner.iter)

    def _next_change(self, cur_iter: int) -> int:
        """The first iteration from ``cur_iter`` on that may have another value than the one before."""
        return cur_iter

    def _warmup_length(self) -> int:
        if self.warmup_iters is None:
            raise ValueError(
                "warmup_by_epoch counts the batches of an epoch, which only EpochBasedRunner has; "
                "give warmup_iters in iterations"
            )
        return self.warmup_iters

    def _progress(self, runner: BaseRunner) -> int:
        return runner.epoch if self.by_epoch else runner.iter

    def _length(self, runner: BaseRunner) -> int:
        """Of the run, in the unit of the policy."""
        length = runner.max_epochs if self.by_epoch else runner.max_iters
        if length is None:
            unit = "max_epochs" if self.by_epoch else "max_iters"
            raise ValueError(f"{type(self).__name__} follows the length of the run, but the runner has no {unit}")
        return length

    def _values(self, method: Callable[..., float], runner: BaseRunner, bases: Any) -> Any:
        """``method(runner, base)`` for the bases of all groups: a list, or for a dict of optimizers a dict of lists."""
        one = runner.optimizer
        if isinstance(one, dict):
            return {name: self._spread(name, method, runner, bases[name]) for name in one}
        return self._spread(None, method, runner, bases)

    def _spread(
        self, name: str | None, method: Callable[..., float], runner: BaseRunner, bases: Sequence[Any]
    ) -> list[float]:
        if getattr(method, "pure", False):
            return self._spreads[name](lambda base: method(runner, base), bases)
        return [method(runner, base) for base in bases]


class Spread:
    """A function of many values, most of them equal: it is called once for each distinct one."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._distinct: list[Any] = []
        self._pick: Callable[[list[Any]], Iterable[Any]] = iter

    def __call__(self, function: Callable[[Any], T], values: Sequence[Any]) -> list[T]:
        if self._values != values:
            self._values = list(values)
            number = {value: i for i, value in enumerate(dict.fromkeys(values))}
            self._distinct = list(number)
            self._pick = itemgetter(*(number[value] for value in values)) if len(number) > 1 else iter
        results = [function(value) for value in self._distinct]
        return results * len(values) if len(results) == 1 else list(self._pick(results))


def per_optimizer(optimizer: Any, function: Callable[[str, Any], T]) -> T | dict[str, T]:
    """``function(name, optimizer)``; for a dict of optimizers that of each. A single one is named by its class."""
    if isinstance(optimizer, dict):
        return {name: function(name, each) for name, each in optimizer.items()}
    return function(type(optimizer).__name__, optimizer)


def format_param(name: str, optim: Any, param: Any) -> list[float]:
    """One number for each param group of the optimizer ``name``.

    Args:
        param: a number for all of them, a list with one each, or a dict: name of the optimizer -> either of these.
            A single optimizer is named by its class.
    Raises:
        KeyError: the dict does not have the name.
        ValueError: a list of another length.
    """
    if isinstance(param, numbers.Number):
        return [param] * len(optim.param_groups)  # type: ignore[list-item]
    if isinstance(param, (list, tuple)):
        if len(param) != len(optim.param_groups):
            raise ValueError(f"{name} has {len(optim.param_groups)} param groups, but {len(param)} values are given")
        return list(param)
    if name not in param:
        raise KeyError(f"no value for the optimizer {name!r}, only for {sorted(param)}")
    return format_param(name, optim, param[name])
