"""Learning-rate hooks: when a policy acts, and the warm-up before it. The formulas are in ``optim.schedule``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..optim.schedule import step_value, warmup_lr
from ..registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

WARMUPS = ("constant", "linear", "exp")


class LrUpdaterHook(Hook):
    """Base of the policies; subclasses give ``get_lr(runner, base_lr)``.

    Args:
        by_epoch: the policy counts epochs, and acts when one starts; otherwise it acts at every iteration.
        warmup: None, "constant", "linear" or "exp"; always counted in iterations from the very first.
        warmup_iters: its length, in iterations (epochs with ``warmup_by_epoch``).
        warmup_ratio: it starts at this share of the policy's value; in (0, 1].
    Raises:
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
        if warmup is not None:
            if warmup not in WARMUPS:
                raise ValueError(f"warmup must be None or one of {WARMUPS}, got {warmup!r}")
            if not warmup_iters > 0:
                raise ValueError(f"warmup={warmup!r} needs warmup_iters > 0, got {warmup_iters}")
            if not 0 < warmup_ratio <= 1:
                raise ValueError(f"warmup_ratio must be in (0, 1], got {warmup_ratio}")
        self.by_epoch = by_epoch
        self.warmup = warmup
        self.warmup_iters: int | None = None if warmup_by_epoch else warmup_iters
        self.warmup_ratio = warmup_ratio
        self.warmup_by_epoch = warmup_by_epoch
        self.warmup_epochs = warmup_iters if warmup_by_epoch else None
        self.base_lr: Any = []  # of each param group; dict optimizers: name -> list
        self.regular_lr: Any = []  # without warm-up

    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define get_lr(runner, base_lr)")

    def get_regular_lr(self, runner: BaseRunner) -> Any:
        if isinstance(runner.optimizer, dict):
            return {k: [self.get_lr(runner, base) for base in self.base_lr[k]] for k in runner.optimizer}
        return [self.get_lr(runner, base) for base in self.base_lr]

    def get_warmup_lr(self, cur_iters: int) -> Any:
        def warm(lr: float) -> float:
            assert self.warmup is not None
            assert self.warmup_iters is not None
            return warmup_lr(self.warmup, lr, cur_iters, self.warmup_iters, self.warmup_ratio)

        if isinstance(self.regular_lr, dict):
            return {k: [warm(lr) for lr in lrs] for k, lrs in self.regular_lr.items()}
        return [warm(lr) for lr in self.regular_lr]

    def _set_lr(self, runner: BaseRunner, lr_groups: Any) -> None:
        if isinstance(runner.optimizer, dict):
            for name, optimizer in runner.optimizer.items():
                for group, lr in zip(optimizer.param_groups, lr_groups[name], strict=False):
                    group["lr"] = lr
        else:
            for group, lr in zip(runner.optimizer.param_groups, lr_groups, strict=False):
                group["lr"] = lr

    def before_run(self, runner: BaseRunner) -> None:
        if runner.optimizer is None:
            raise RuntimeError(
                f"{type(self).__name__} needs an optimizer; give the runner one, or register no lr_config"
            )

        # A resumed optimizer brings the initial_lr of its first run, which then wins over the config's lr.
        def base(optimizer: Any) -> list[float]:
            return [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]

        if isinstance(runner.optimizer, dict):
            self.base_lr = {name: base(optimizer) for name, optimizer in runner.optimizer.items()}
        else:
            self.base_lr = base(runner.optimizer)

    def before_train_epoch(self, runner: BaseRunner) -> None:
        if self.warmup_iters is None:
            assert self.warmup_epochs is not None
            self.warmup_iters = self.warmup_epochs * len(runner.data_loader)
        if self.by_epoch:
            self.regular_lr = self.get_regular_lr(runner)
            self._set_lr(runner, self.regular_lr)

    def before_train_iter(self, runner: BaseRunner) -> None:
        cur_iter = runner._iter
        if self.warmup_iters is None:
            raise ValueError(
                "warmup_by_epoch counts the batches of an epoch, which only EpochBasedRunner has; "
                "give warmup_iters in iterations"
            )
        if not self.by_epoch:
            self.regular_lr = self.get_regular_lr(runner)
            if self.warmup is None or cur_iter >= self.warmup_iters:
                self._set_lr(runner, self.regular_lr)
            else:
                self._set_lr(runner, self.get_warmup_lr(cur_iter))
        elif self.warmup is not None and cur_iter <= self.warmup_iters:
            done = cur_iter == self.warmup_iters
            self._set_lr(runner, self.regular_lr if done else self.get_warmup_lr(cur_iter))


@HOOKS.register_module()
class FixedLrUpdaterHook(LrUpdaterHook):
    """The base lr throughout; useful for its warm-up."""

    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        return base_lr


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
        if not isinstance(step, (int, list)) or isinstance(step, bool):
            raise TypeError(f"step must be an int or a list of ints, got {type(step).__name__}")
        if not all(isinstance(s, int) and s > 0 for s in ([step] if isinstance(step, int) else step)):
            raise ValueError(f"step must be positive, got {step}")
        self.step, self.gamma, self.min_lr = step, gamma, min_lr
        super().__init__(**kwargs)

    def get_lr(self, runner: BaseRunner, base_lr: float) -> float:
        progress = runner._epoch if self.by_epoch else runner._iter
        return step_value(base_lr, progress, self.step, self.gamma, self.min_lr)
