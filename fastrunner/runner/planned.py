"""A runner's plan, and the attributes that it is made for: writing to one of them makes the plan stale."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from ..hooks.hook import Hook
from ..log.writer import LogWriter
from ..plan.dispatch import HookList
from ..plan.explain import explain
from ..plan.host_reads import HostReads
from ..plan.run_plan import RunPlan
from ..step.choose import Step
from ..step.config import StepConfig

if TYPE_CHECKING:
    from .base import BaseRunner


class Planned:
    """The part of a runner that follows a plan.

    Attributes:
        run_kwargs: arguments of run() that go on to train_step.
    """

    _plan: RunPlan | None = None
    _step: Step | None = None
    step_config: StepConfig
    logger: logging.Logger
    run_kwargs: dict[str, Any]
    log_writer: LogWriter
    _loaders: list[Any]
    host_reads: HostReads

    @property
    def model(self) -> Any:
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        self._model = model
        self._plan_is_stale()

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._plan_is_stale()

    @property
    def _hooks(self) -> list[Hook]:
        return self._hook_list

    @_hooks.setter
    def _hooks(self, hooks: list[Hook]) -> None:
        self._hook_list = HookList(hooks, self._plan_is_stale)
        self._plan_is_stale()

    @property
    def _max_iters(self) -> int | None:
        return self._length

    @_max_iters.setter
    def _max_iters(self, length: int | None) -> None:
        self._length = length
        if self._plan is not None:
            self._plan.somebody_acted()  # what is due may depend on it, and the loop stops there

    def _pass_on(self, kwargs: dict[str, Any]) -> None:
        """Let train_step have these arguments of run() or train()."""
        if kwargs != self.run_kwargs:
            self.run_kwargs = kwargs
            self._plan_is_stale()

    def _plan_is_stale(self) -> None:
        if self._plan is not None:
            self._plan.mark_stale()

    @property
    def step(self) -> Step:
        """How iterations are computed, for the model and the optimizer as they are now."""
        if self._step is None or not self._step.fits(self._model, self._optimizer):
            self._step = Step(self._model, self._optimizer, self.step_config, self.logger.warning)
        return self._step

    @property
    def stepping_model(self) -> Any:
        """What has the ``train_step`` of this run's recipe: mostly the model itself."""
        return self.step.model

    def current_plan(self) -> RunPlan:
        """The plan for hooks, model and optimizer as they are now."""
        plan = self._plan
        return self.renew_plan() if plan is None or plan.stale or plan.hooks != self._hooks else plan

    def explain(self) -> str:
        """The plan as text: what was lowered, what is called when, what was refused and why.

        The first call lets the next 10 iterations be watched for lines that read the host. They are logged then, and
        are part of every later answer. Before ``run()`` the plan is the one that the hooks would give now.
        """
        self.host_reads.arm()
        if self._plan is None:
            return explain(RunPlan(cast("BaseRunner", self)), cast("BaseRunner", self))
        return explain(self.current_plan(), cast("BaseRunner", self))

    def renew_plan(self) -> RunPlan:
        """Make the plan again: methods may be new on hooks. ``FASTRUNNER_PLAN=off`` asks every hook, as MMCV does."""
        self._plan = RunPlan(cast("BaseRunner", self), previous=self._plan)
        self.log_writer.deferring = self._plan.alone
        for loader in self._loaders:
            loader.prefetch_over_epoch_end = self._plan.no_prefetch is None
        return self._plan
