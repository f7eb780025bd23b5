"""Gradient accumulation: one update for several iterations.

p.grad = sum_i grad(loss_i) / n           n = cumulative_iters; what is left at the run's end is divided by its number
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..registry import HOOKS
from .optimizer import OptimizerHook, check_loss

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


class SteppingHook(OptimizerHook):
    """OptimizerHook in two parts, which accumulation calls at different times and loss scaling replaces."""

    def _backward(self, runner: BaseRunner, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self, runner: BaseRunner) -> None:
        """Clip, log and step."""
        optimizer = runner.optimizer
        if self.grad_clip is not None and self._folds(runner.model, optimizer):
            self._log_norm(runner, optimizer.clipped_step(self.grad_clip["max_norm"]))
            return
        self._clip(runner)
        optimizer.step()

    def _clip(self, runner: BaseRunner) -> None:
        if self.grad_clip is not None:
            self._log_norm(runner, self.clip_grads(runner.model.parameters()))

    def _log_norm(self, runner: BaseRunner, grad_norm: Tensor | None) -> None:
        if grad_norm is not None:
            runner.log_buffer.update({"grad_norm": grad_norm}, runner.outputs["num_samples"])

    def _loss(self, runner: BaseRunner) -> Tensor:
        check_loss(runner.outputs)
        loss: Tensor = runner.outputs["loss"]
        if self.detect_anomalous_params:
            self.detect_anomalous_parameters(loss, runner)
        return loss

    def before_run(self, runner: BaseRunner) -> None:
        if runner.optimizer is None or isinstance(runner.optimizer, dict):
            raise TypeError(
                f"{type(self).__name__} drives one optimizer, the runner has {type(runner.optimizer).__name__}; "
                "a model that steps its optimizers inside train_step wants optimizer_config=None"
            )


@HOOKS.register_module()
class GradientCumulativeOptimizerHook(SteppingHook):
    """OptimizerHook that updates every ``cumulative_iters`` iterations, counted from the start of the run's counter.

    Windows go over the ends of epochs. The run's last iterations, fewer than a window, are a window of their own. A
    checkpoint inside a window holds the gradients so far, so that a resume is exact.

    Args:
        cumulative_iters: iterations of a window.
        no_sync: under DistributedDataParallel, let the ranks exchange gradients at the end of a window only. The sums
            are then rounded in another order.
        **kwargs: see :class:`OptimizerHook`.
    Raises:
        TypeError, ValueError: ``cumulative_iters`` is no int, or not positive.
    """

    def __init__(self, cumulative_iters: int = 1, no_sync: bool = True, **kwargs: Any) -> None:
        if not isinstance(cumulative_iters, int) or isinstance(cumulative_iters, bool):
            raise TypeError(f"cumulative_iters must be an int, got {cumulative_iters!r}")
        if cumulative_iters <= 0:
            raise ValueError(f"cumulative_iters must be > 0, got {cumulative_iters}")
        super().__init__(**kwargs)
        self.cumulative_iters = cumulative_iters
        self.no_sync = no_sync
        self.divisible_iters = 0  # iterations of whole windows
        self.remainder_iters = 0  # of the last one
        self.initialized = False
        self._model: nn.Module | None = None
        self._rank = 0
        self._seen_iters = 0  # iterations whose gradients were added
        self._resumed: dict[str, Any] | None = None

    def has_batch_norm(self, module: nn.Module) -> bool:
        return any(isinstance(each, _BatchNorm) for each in module.modules())

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        self.initialized = False
        self._model, self._rank = runner.model, runner.rank
        self._put_back(runner)

    def _init(self, runner: BaseRunner) -> None:
        """Worked out at the first iteration, when the length of the run is known."""
        self._put_back(runner)  # what a hook behind this one has resumed in its before_run
        if runner.iter % self.cumulative_iters != 0 and self._seen_iters != runner.iter:
            runner.logger.warning(
                f"iteration {runner.iter} is inside a window of {self.cumulative_iters}, and the gradients of its "
                "first iterations are not in what was resumed: the next update lacks them"
            )
        if self.cumulative_iters > 1 and self.has_batch_norm(runner.model):
            runner.logger.warning(
                "the model has BatchNorm layers: they see the batch of an iteration, not the accumulated one"
            )
        assert runner.max_iters is not None
        self.divisible_iters = runner.max_iters // self.cumulative_iters * self.cumulative_iters
        self.remainder_iters = runner.max_iters - self.divisible_iters
        self.initialized = True

    def _get_loss_factor(self, runner: BaseRunner) -> int:
        """What the loss of this iteration is divided by."""
        assert runner.max_iters is not None
        whole = runner.iter < runner.max_iters - self.remainder_iters
        return self.cumulative_iters if whole else self.remainder_iters

    def _ends_window(self, runner: BaseRunner) -> bool:
        return self.every_n_iters(runner, self.cumulative_iters) or self.is_last_iter(runner)

    def place(self, runner: BaseRunner) -> tuple[bool, float]:
        """Whether the iteration at hand ends its window, and what its loss is divided by: for graphs that do both."""
        if not self.initialized:
            self._init(runner)
        return self._ends_window(runner), float(self._get_loss_factor(runner))

    def before_train_iter(self, runner: BaseRunner) -> None:
        if self.no_sync and isinstance(runner.model, DistributedDataParallel):
            runner.model.require_backward_grad_sync = self._ends_window(runner)  # what ddp.no_sync() sets

    def after_train_iter(self, runner: BaseRunner) -> None:
        if not self.initialized:
            self._init(runner)
        self._backward(runner, self._loss(runner) / self._get_loss_factor(runner))
        self._seen_iters = runner.iter + 1
        if self._ends_window(runner):
            self._update(runner)
            runner.model.zero_grad()
            runner.optimizer.zero_grad()

    def close(self) -> None:
        if self.no_sync and isinstance(self._model, DistributedDataParallel):
            self._model.require_backward_grad_sync = True

    # A window that a checkpoint falls into.

    def state_dict(self) -> dict[str, Any]:
        """The gradients so far, by parameter; none between windows."""
        named = {} if self._model is None else dict(self._model.named_parameters())
        inside = self._seen_iters % self.cumulative_iters != 0
        grads = {name: p.grad for name, p in named.items() if p.grad is not None} if inside else {}
        shared = not (self.no_sync and isinstance(self._model, DistributedDataParallel))
        return {"seen_iters": self._seen_iters, "grads": grads, "rank": None if shared else self._rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state

    def _put_back(self, runner: BaseRunner) -> None:
        """Give the parameters the gradients that a resume has brought."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        if state["rank"] not in (None, runner.rank):
            warnings.warn(
                f"rank {runner.rank} has no accumulated gradients of its own beside the checkpoint; its share of the "
                "next update is missing",
                stacklevel=2,
            )
            return
        self._seen_iters = state["seen_iters"]
        for name, param in runner.model.named_parameters():
            grad = state["grads"].get(name)
            param.grad = None if grad is None else grad.to(param, copy=True)
