"""What both runners share: state, hooks, and how a run starts and ends. (Saving and resuming: ``resume``.)

All state is in plain attributes with MMCV's names (``_epoch``, ``_iter``, ``_max_iters``, ``_hooks``, ...). Users and
hooks read and write them at any time, so nothing here is cached across a call.
"""

from __future__ import annotations

import logging
import os
import os.path as osp
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..data.loader import as_loader, check_source
from ..dist import get_dist_info
from ..hooks.hook import Hook
from ..hooks.priority import Priority, get_priority
from ..log import LogBuffer, get_logger
from ..log.writer import LogWriter
from ..model.parallel import unwrap
from ..plan.dispatch import HookError, following, named
from ..plan.host_reads import HostReads
from ..step.config import StepConfig, make_config
from .checks import check_count, check_model, check_optimizer, check_workflow
from .garbage import Garbage
from .register import RegisterMixin
from .resume import ResumeMixin
from .utils import get_host_info, get_time_str, new_work_dir

Workflow = Sequence[tuple[str, int]]


class BaseRunner(RegisterMixin, ResumeMixin, metaclass=ABCMeta):
    """Base of the runners.

    Args:
        model: has ``train_step(data_batch, optimizer, **kwargs)`` and ``val_step``; ``fastrunner.supervised`` gives
            them to a plain module.
        batch_processor: MMCV's older way: ``batch_processor(model, data_batch, train_mode, **kwargs)`` -> outputs.
        optimizer: an optimizer, or a dict of them.
        work_dir: folder for logs and checkpoints; None: ``./work_dirs/<timestamp>``. Created with its first file.
        logger: None: ``get_logger("fastrunner")``.
        meta: goes into logs and checkpoints.
        max_iters, max_epochs: the length of the run; one of them.
        step: how iterations are computed, e.g. ``dict(recipe="graph")``; see ``fastrunner.StepConfig``.
    Raises:
        TypeError: an argument of the wrong type, or a model without ``train_step``.
        ValueError: both lengths are given, or one is not positive; a recipe that there is not.
        RuntimeError: a ``batch_processor`` for a model that has ``train_step``.
    """

    def __init__(
        self,
        model: Any,
        batch_processor: Callable[..., Any] | None = None,
        optimizer: Optimizer | dict[str, Optimizer] | None = None,
        work_dir: str | None = None,
        logger: logging.Logger | None = None,
        meta: dict[str, Any] | None = None,
        max_iters: int | None = None,
        max_epochs: int | None = None,
        step: StepConfig | Mapping[str, Any] | str | None = None,
    ) -> None:
        check_model(model, batch_processor)
        check_optimizer(optimizer)
        if logger is not None and not isinstance(logger, logging.Logger):
            raise TypeError(f"logger must be a logging.Logger or None, got {type(logger).__name__}")
        if meta is not None and not isinstance(meta, dict):
            raise TypeError(f"meta must be a dict or None, got {type(meta).__name__}")
        if work_dir is not None and not isinstance(work_dir, str):
            raise TypeError(f"work_dir must be a str or None, got {type(work_dir).__name__}")
        if max_epochs is not None and max_iters is not None:
            raise ValueError("Only one of `max_epochs` or `max_iters` can be set.")
        check_count("max_epochs", max_epochs)
        check_count("max_iters", max_iters)

        self.step_config = make_config(step)
        self.model = model
        self.batch_processor = batch_processor
        self.optimizer = optimizer
        self.logger = logger if logger is not None else get_logger("fastrunner")
        self.meta = meta
        self.mode: str | None = None
        self.timestamp = get_time_str()
        self.work_dir: str = osp.abspath(work_dir) if work_dir is not None else new_work_dir(self.timestamp)
        if work_dir is not None:
            os.makedirs(self.work_dir, exist_ok=True)
        self.log_buffer = LogBuffer()
        self.log_writer = LogWriter(self.logger)
        self.garbage = Garbage()
        self.host_reads = HostReads()
        self.data_loader: Any = None
        self.data_batch: Any
        self.outputs: Any
        self._model_name = type(unwrap(model)).__name__
        self._rank, self._world_size = get_dist_info()
        self._hooks = []
        self._epoch = self._iter = self._inner_iter = 0
        self._max_epochs, self._max_iters = max_epochs, max_iters

        self.stop_reason: str | None = None
        self._stop_seen = True  # a run has ended by it; the next one may start
        self.resumed_buffers: dict[
            str, Tensor
        ] = {}  # of the checkpoint, for hooks that make such buffers in before_run
        self.saved_iter = -1  # finished iterations of the newest checkpoint
        self.run_kwargs = {}
        self._uncounted = ""  # "iter" or "epoch": it has happened, but its counter says so only after the hooks
        self._resumed: dict[str, Any] | None = None  # workflow and loaders of a resume, until run() takes them
        self._sources: list[Any] = []  # run()'s data loaders
        self._loaders: list[Any] = []  # the same with one interface, see data.loader
        self._workflow: list[list[Any]] = []  # run()'s workflow

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def hooks(self) -> list[Hook]:
        """The registered hooks in the order they run; the live list."""
        return self._hooks

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self._epoch

    @property
    def iter(self) -> int:
        """Finished iterations."""
        return self._iter

    @property
    def inner_iter(self) -> int:
        """Number of the iteration within its epoch."""
        return self._inner_iter

    @property
    def max_epochs(self) -> int | None:
        return self._max_epochs

    @property
    def max_iters(self) -> int | None:
        return self._max_iters

    # The loops, one pair a runner.

    @abstractmethod
    def train(self, data_loader: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def val(self, data_loader: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def run(self, data_loaders: list[Any], workflow: Workflow, **kwargs: Any) -> None: ...

    @abstractmethod
    def save_checkpoint(self, out_dir: str, *args: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def workflow_state(self) -> dict[str, Any]:
        """The workflow, which of its entries runs, and how much of that is done: ``{"entries", "flow", "done"}``."""

    @abstractmethod
    def loader_states(self) -> list[dict[str, Any]]:
        """Where each of run()'s data loaders is: what its ``load_state_dict`` needs."""

    def run_iter(self, data_batch: Any, train_mode: bool, **kwargs: Any) -> None:
        """One step of the model, without the update: ``outputs`` and the log buffer get what it returns.

        Raises:
            TypeError: the step did not return a dict.
            KeyError: it has log_vars but no num_samples.
        """
        if self.batch_processor is not None:
            outputs = self.batch_processor(self.model, data_batch, train_mode=train_mode, **kwargs)
        elif train_mode:
            outputs = self.stepping_model.train_step(data_batch, self.optimizer, **kwargs)
        else:
            outputs = self._val_step(data_batch, **kwargs)
        self.check_outputs(outputs)
        if "log_vars" in outputs:
            self.log_buffer.update(outputs["log_vars"], outputs["num_samples"])
        self.outputs = outputs

    def check_outputs(self, outputs: Any) -> None:
        """Raise TypeError if a step did not return a dict, KeyError if it has log_vars but no num_samples."""
        if not isinstance(outputs, dict):
            step = '"batch_processor()"' if self.batch_processor else '"model.train_step()" and "model.val_step()"'
            raise TypeError(f"{step} must return a dict, got {type(outputs).__name__}")
        if "log_vars" in outputs and "num_samples" not in outputs:
            raise KeyError("outputs with log_vars also need num_samples, the weight of their averages")

    def _val_step(self, data_batch: Any, **kwargs: Any) -> Any:
        return self.model.val_step(data_batch, self.optimizer, **kwargs)

    # Readers of the optimizer.

    def current_lr(self) -> Any:
        """The lr of each param group; for a dict of optimizers a dict of lists."""
        return self._per_group(lambda group: group["lr"])

    def current_momentum(self) -> Any:
        """The momentum (or the first beta, or 0) of each param group; for a dict of optimizers a dict of lists."""
        return self._per_group(lambda group: group["momentum"] if "momentum" in group else group.get("betas", (0,))[0])

    def _per_group(self, read: Callable[[dict[str, Any]], Any]) -> Any:
        if isinstance(self.optimizer, Optimizer):
            return [read(group) for group in self.optimizer.param_groups]
        if isinstance(self.optimizer, dict):
            return {name: [read(group) for group in each.param_groups] for name, each in self.optimizer.items()}
        raise RuntimeError("lr and momentum are not known because the runner has no optimizer")

    # Hooks.

    def register_hook(self, hook: Hook, priority: int | str | Priority = "NORMAL") -> None:
        """Add a hook behind those of the same or a higher priority.

        Raises:
            TypeError: not a Hook. A callable can be wrapped: ``ClosureHook("after_train_iter", fn)``.
            ValueError: it has an attribute ``priority`` already; the name is reserved, and a hook registers once.
        """
        if not isinstance(hook, Hook):
            raise TypeError(
                f"a hook must be a fastrunner.Hook, got {type(hook).__name__}; "
                'a callable can be wrapped: ClosureHook("after_train_iter", fn)'
            )
        if hasattr(hook, "priority"):
            raise ValueError(
                f"{type(hook).__name__} has an attribute 'priority', which register_hook sets: "
                "it was registered before, or its class uses the reserved name"
            )
        hook.priority = get_priority(priority)
        index = len(self._hooks)
        while index > 0 and self._hooks[index - 1].priority > hook.priority:
            index -= 1
        self._hooks.insert(index, hook)

    def call_hook(self, fn_name: str) -> None:
        """Call the method ``fn_name`` of every hook, in order."""
        self.log_writer.flush()
        for hook in following(self._hooks):  # the live list: hooks may register further ones
            try:
                getattr(hook, fn_name)(self)
            except Exception as error:
                if isinstance(error, HookError):
                    raise
                raise named(error, type(hook).__name__, fn_name) from error

    def get_hook_info(self) -> str:
        """Which hooks act at which stage, as text."""
        names = {priority.value: priority.name for priority in Priority}
        blocks = []
        for stage in Hook.stages:
            lines = [
                f"({names.get(hook.priority, hook.priority):<12}) {type(hook).__name__:<35}"
                for hook in self._hooks
                if stage in hook.get_triggered_stages()
            ]
            if lines:
                blocks.append(f"{stage}:\n" + "\n".join(lines) + "\n -------------------- ")
        return "\n".join(blocks)

    # Start and end of a run.

    def stop(self, reason: str) -> None:
        """Ask the run to end after the current iteration.

        The iteration is finished with all its hooks, an unfinished epoch is not ended (no ``after_train_epoch``), then
        ``after_run`` fires and ``run()`` returns. ``stop_reason`` holds the reason. The next ``run()`` goes on
        where this one was stopped. Asked for before ``run()``, it ends that run at once.
        """
        self.stop_reason = reason
        self._stop_seen = False
        if self._plan is not None:
            self._plan.next_due = 0  # the loop looks up

    def _begin(self, data_loaders: list[Any], workflow: Workflow, limit: str, unit: str) -> None:
        """Check the arguments of ``run()`` and log how it starts."""
        if not isinstance(data_loaders, list):
            raise TypeError(
                f"data_loaders must be a list, one for each workflow entry, got {type(data_loaders).__name__}"
            )
        check_workflow(self, workflow)
        if len(data_loaders) != len(workflow):
            raise ValueError(
                f"the workflow has {len(workflow)} entries, but there are {len(data_loaders)} data loaders; "
                "give one for each entry"
            )
        for number, ((mode, _), loader) in enumerate(zip(workflow, data_loaders, strict=True)):
            check_source(loader, f"data loader {number} (for {mode!r})")
        length = getattr(self, limit)
        if length is None:
            raise ValueError(f"{limit.lstrip('_')} must be set: give it to the runner, it is the length of the run")
        check_count(limit.lstrip("_"), length)
        self._sources = list(data_loaders)
        self._loaders = [as_loader(source) for source in data_loaders]
        self._workflow = [list(entry) for entry in workflow]
        if self._stop_seen:
            self.stop_reason = None
        self.logger.info(f"Start running, host: {get_host_info()}, work_dir: {self.work_dir}")
        self.logger.info(f"Hooks will be executed in the following order:\n{self.get_hook_info()}")
        self.logger.info(f"workflow: {list(workflow)}, max: {length} {unit}")

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Around all of a run: whatever ends it, the counters are true and what hooks own is closed."""
        failed = True
        try:
            self.garbage.start()
            yield
            self.log_writer.close()
            failed = False
            if self.stop_reason is not None:
                self._keep_place()
                self.logger.info(f"stopped at epoch {self._epoch}, iter {self._iter}: {self.stop_reason}")
        except BaseException as error:
            self.logger.error(
                f"the run ends at epoch {self._epoch}, iter {self._iter}: {type(error).__name__}: {error}"
            )
            raise
        finally:
            self._uncounted = ""
            self._stop_seen = True
            self.resumed_buffers = {}
            self.garbage.restore()
            self._close_log(failed)
            if self._step is not None:
                self._step.close()
            for loader in self._loaders:
                loader.prefetch_over_epoch_end = False
                loader.close()
            self._close_hooks(failed)

    def _close_log(self, failed: bool) -> None:
        try:
            self.log_writer.close()
        except Exception as error:
            if not failed:
                raise
            self.logger.error(f"the log could not be written: {type(error).__name__}: {error}")

    def _close_hooks(self, failed: bool) -> None:
        """Call every ``close()``. What one raises is logged where an error is under way already, else raised."""
        errors = []
        for hook in self._hooks:
            close = getattr(hook, "close", None)
            if callable(close):
                try:
                    close()
                except Exception as error:
                    self.logger.error(f"{type(hook).__name__}.close raised {type(error).__name__}: {error}")
                    errors.append((hook, error))
        if errors and not failed:
            first, cause = errors[0]
            raise named(cause, type(first).__name__, "close") from cause

    def _before_run(self) -> None:
        self.call_hook("before_run")
        self._plan = None  # of another run
        self.renew_plan()  # what before_run did to hooks counts
        self.resumed_buffers = {}
