"""Exponential moving average of the parameters.

    ema <- ema * (1 - m) + m * p          m = min(momentum**interval, (1 + iter) / (warm_up + iter))
Source: MMCV 1.x's EMAHook, formula and names.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.parallel import unwrap
from ..optim.ema_term import EmaTerm
from ..registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

PREFIX = "ema_"


@HOOKS.register_module()
class EMAHook(Hook):
    """Keeps an average of every parameter in a buffer of the model, ``ema_`` + its name with ``.`` as ``_``.

    Evaluations, the val workflow and checkpoints see the averages, and training the raw weights, in both runners. In
    the epoch runner the two are swapped at the end of each epoch and back at the start of the next; within an epoch,
    and in the iteration runner, they are swapped around each evaluation, val iteration and save. A checkpoint so holds
    the averages under the parameters' names, and the raw weights under ``ema_*``, and so does the model after a run.

    Buffers such as BatchNorm's statistics are not averaged; frozen parameters are. Give it a priority between the
    optimizer hook's (40) and CheckpointHook's (50), or what is saved is one iteration behind.

    Args:
        momentum: weight of the newest parameters, in (0, 1).
        interval: iterations between two updates of the average; it acts at iterations 0, interval, 2 * interval, ...
        warm_up: a larger number makes the first averages follow the parameters longer.
        resume_from: path of a checkpoint to resume from once the buffers exist.
    Raises:
        ValueError: interval or momentum out of range.
    Cost: two passes over parameters and averages, 20 B a float32 value, every ``interval`` iterations.
    """

    buffer_prefix = PREFIX  # a resume keeps tensors of this prefix for the hook until the buffers exist

    def __init__(
        self, momentum: float = 0.0002, interval: int = 1, warm_up: int = 100, resume_from: str | None = None
    ) -> None:
        if not isinstance(interval, int) or interval <= 0:
            raise ValueError(f"interval must be an int > 0, got {interval!r}")
        if not 0 < momentum < 1:
            raise ValueError(f"momentum must be in (0, 1), got {momentum}")
        if not warm_up >= 0:
            raise ValueError(f"warm_up must be >= 0, got {warm_up}")
        self.warm_up = warm_up
        self.interval = interval
        self.momentum = momentum**interval
        self.checkpoint = resume_from
        self.param_ema_buffer: dict[str, str] = {}
        self.model_parameters: dict[str, nn.Parameter] = {}
        self.model_buffers: dict[str, Tensor] = {}
        # The parameters hold the averages, the buffers the raw weights. True before the first epoch, where both are
        # equal, unless an MMCV checkpoint was resumed: those are saved after the swap and hold no hook state.
        self._swapped = True
        self._seen_iters = 0  # iterations whose weights went into the averages
        self._seen_epochs: int | None = None  # epochs whose end swapped; None: no epoch has started (iteration runner)
        self._back_after_val = False
        self._resumed = False  # the state was loaded, and before_run has not used it yet
        self._params: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._term = EmaTerm((), (), self.momentum)

    def before_run(self, runner: BaseRunner) -> None:
        self.model_parameters = dict(unwrap(runner.model).named_parameters())
        if not self._continues(runner):
            self._make_averages(runner)
            if self.checkpoint is not None:
                runner.resume(self.checkpoint)
            if not self._resumed:
                self._swapped = runner.max_epochs is not None  # MMCV's iteration runner never swaps
        if self._resumed:
            self._catch_up(runner)
            self._resumed = False
        if runner.max_epochs is None:  # no epoch's start will do it
            self._swap_to(False)

    def _make_averages(self, runner: BaseRunner) -> None:
        model = unwrap(runner.model)
        self.param_ema_buffer = {name: PREFIX + name.replace(".", "_") for name in self.model_parameters}
        for name, param in self.model_parameters.items():
            # Tensors that a resume found in the file but not in the model are ours, if the name fits.
            resumed = runner.resumed_buffers.get(self.param_ema_buffer[name])
            value = param.detach().clone() if resumed is None else resumed.to(param, copy=True)
            model.register_buffer(self.param_ema_buffer[name], value)
        self.model_buffers = dict(model.named_buffers())
        self._params = list(self.model_parameters.values())
        self._averages = [self.model_buffers[name] for name in self.param_ema_buffer.values()]
        self._term = EmaTerm(self._params, self._averages, self.momentum)

    def _continues(self, runner: BaseRunner) -> bool:
        """Whether this is a further run() of what was trained here, so that averages and buffers are there already."""
        params = list(self.model_parameters.values())
        same = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        return same and not self._resumed and 0 < self._seen_iters == runner._iter and self.checkpoint is None

    def _catch_up(self, runner: BaseRunner) -> None:
        """Do what was not done when the checkpoint was written, by a hook that runs before this one."""
        if self._seen_iters < runner._iter:
            self._swap_to(False)
            self._average(runner._iter - 1)
        if self._seen_epochs is not None and self._seen_epochs < runner._epoch:
            self._swap_to(True)

    def after_train_iter(self, runner: BaseRunner) -> None:
        self._average(runner._iter)

    def _average(self, cur_iter: int) -> None:
        term = self.average_at(cur_iter)
        if term is not None:
            term.update()

    def average_at(self, cur_iter: int) -> EmaTerm | None:
        """The average that iteration ``cur_iter`` takes, to be taken with its update; None if it takes none."""
        self._seen_iters = cur_iter + 1
        if cur_iter % self.interval != 0:
            return None
        # warm_up=0 would divide by zero at iteration 0, where the bound is anyway above any momentum.
        bound = (1 + cur_iter) / (self.warm_up + cur_iter) if self.warm_up + cur_iter else 1.0
        self._term.momentum = self.momentum if self.momentum < bound else bound
        return self._term

    def before_train_epoch(self, runner: BaseRunner) -> None:
        self._seen_epochs = runner._epoch
        self._swap_to(False)

    def after_train_epoch(self, runner: BaseRunner) -> None:
        self._seen_epochs = runner._epoch + 1
        self._swap_to(True)

    def after_epoch(self, runner: BaseRunner) -> None:
        self._swap_to(True)  # the end of the iteration runner's loop; after a val epoch nothing changes

    def before_val_iter(self, runner: BaseRunner) -> None:
        self._back_after_val = not self._swapped  # between epochs they are swapped already
        self._swap_to(True)

    def after_val_iter(self, runner: BaseRunner) -> None:
        if self._back_after_val:
            self._swap_to(False)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within: the model's parameters hold the averages."""
        was = self._swapped
        self._swap_to(True)
        try:
            yield
        finally:
            self._swap_to(was)

    def _swap_to(self, averages: bool) -> None:
        """Let the parameters hold the averages and the buffers the raw weights, or the other way round."""
        if self._swapped == averages:
            return
        with torch.no_grad():
            for param, average in zip(self._params, self._averages, strict=True):
                raw = param.clone()
                param.copy_(average)
                average.copy_(raw)
        self._swapped = averages

    def state_dict(self) -> dict[str, Any]:
        return {"swapped": self._swapped, "seen_iters": self._seen_iters, "seen_epochs": self._seen_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._swapped = state["swapped"]
        self._seen_iters, self._seen_epochs = state["seen_iters"], state["seen_epochs"]
        self._resumed = True


@contextmanager
def averaged_weights(runner: Any) -> Iterator[None]:
    """Within: every hook that keeps averages of the weights (has ``averaged_weights()``) has them in the model."""
    with ExitStack() as stack:
        for hook in runner._hooks:
            enter = getattr(hook, "averaged_weights", None)
            if enter is not None:
                stack.enter_context(enter())
        yield
