"""The epoch runner: passes over the data, with hooks before and after each."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..data.loader import as_loader
from ..registry import RUNNERS
from .base import BaseRunner, Workflow


@RUNNERS.register_module()
class EpochBasedRunner(BaseRunner):
    """Trains epoch by epoch. A workflow entry ``("train", 2)`` is two epochs, ``("val", 1)`` a pass without updates."""

    _flow = 0  # entry of the workflow that runs
    _flow_done = 0  # epochs of it that are finished
    _midway = False  # inside an epoch that is not used up
    _cut = False  # stop() has ended a pass without updates before its end
    _first_iter = 0  # value of _iter at the first batch of the epoch
    _start = 0  # batch that the next epoch starts from: not 0 after a resume in the middle of one

    def run(self, data_loaders: list[Any], workflow: Workflow, max_epochs: int | None = None, **kwargs: Any) -> None:
        """Run the workflow, over and over, until ``max_epochs`` are trained.

        Args:
            data_loaders: one source of batches for each entry of the workflow.
            workflow: list of ``(mode, epochs)``; the modes are names of methods of the runner.
            **kwargs: passed to ``train`` and ``val``, and on to the model's ``train_step``.
        Raises:
            TypeError, ValueError: bad arguments, an empty loader, a workflow that does not train.
            HookError: a hook raised; it is also an instance of what was raised.
        """
        if max_epochs is not None:
            warnings.warn(
                "setting max_epochs in run is deprecated, please set max_epochs in runner_config",
                DeprecationWarning,
                stacklevel=2,
            )
            self._max_epochs = max_epochs
        self._begin(data_loaders, workflow, "_max_epochs", "epochs")
        for (mode, _), loader in zip(workflow, data_loaders, strict=True):
            if mode == "train":
                self._max_iters = self._max_epochs * len(loader)  # type: ignore[operator]
                break
        with self._running():
            self._before_run()
            flow, done, positions = self._take_resumed()
            self._start = positions[flow]
            self._flow, self._flow_done = flow, done
            self._midway, self._first_iter = self._start > 0, self._iter - self._start
            left = (flow, done) != (0, 0)  # of the round that was interrupted: its val entries follow its last epoch
            while (left or self._epoch < self._max_epochs) and self.stop_reason is None:  # type: ignore[operator]
                left = False
                for self._flow in range(flow, len(workflow)):
                    self._run_entry(*workflow[self._flow], done, data_loaders[self._flow], **kwargs)
                    done = 0
                    if self.stop_reason is not None:
                        break  # the place in the workflow stays where it is, for a checkpoint in after_run
                flow = 0
            self.call_hook("after_run")

    def _run_entry(self, mode: str, epochs: int, done: int, data_loader: Any, **kwargs: Any) -> None:
        """One entry of the workflow, of which ``done`` epochs are behind us."""
        self._flow_done = done
        while self._flow_done < epochs and self.stop_reason is None:
            if mode == "train" and self._epoch >= self._max_epochs:  # type: ignore[operator]
                break
            self._cut = False
            getattr(self, mode)(data_loader, **kwargs)
            self._flow_done += not (self._midway or self._cut)

    def train(self, data_loader: Any, **kwargs: Any) -> None:
        """One epoch."""
        self.model.train()
        self.mode = "train"
        self.data_loader = data_loader
        if self._max_epochs is not None:
            self._max_iters = self._max_epochs * len(data_loader)
        if kwargs or self.run_kwargs:
            self._pass_on(kwargs)
        start, self._start = self._start, 0
        self._first_iter = self._iter - start
        self._midway = True
        plan = self.renew_plan()
        plan.fire(plan.before_train_epoch, self)
        if not plan.only_ours(plan.before_train_epoch):
            plan = self.renew_plan()  # that stage may have changed hooks
        if start:
            self._inner_iter = start - 1  # should no batch be left, the epoch's end sees the last one

        batches = enumerate(self._loader_of(data_loader).start(self._epoch, start), start)
        for self._inner_iter, self.data_batch in batches:
            if self._iter < plan.next_due:  # nobody is called: the iteration is the step
                plan.quiet(self)
            else:
                plan = self.current_plan()
                plan.at(self)(self)
            del self.data_batch
            self._iter += 1
            if self.stop_reason is not None and self._inner_iter + 1 < len(data_loader):
                return

        self._midway = False
        self._uncounted = "epoch"
        plan = self.current_plan()
        plan.fire(plan.after_train_epoch, self)
        self._uncounted = ""
        self._epoch += 1

    @torch.no_grad()
    def val(self, data_loader: Any, **kwargs: Any) -> None:
        """One pass without updates; counters of training stay."""
        self.model.eval()
        self.mode = "val"
        self.data_loader = data_loader
        plan = self.current_plan()
        plan.fire(plan.before_val_epoch, self)
        batches = enumerate(self._loader_of(data_loader).start(self._epoch))
        for self._inner_iter, self.data_batch in batches:
            plan = self.current_plan()
            plan.fire(plan.before_val_iter, self)
            self.run_iter(self.data_batch, train_mode=False)
            plan.fire(plan.after_val_iter, self)
            del self.data_batch
            if self.stop_reason is not None and self._inner_iter + 1 < len(data_loader):
                self._cut = True
                return
        plan = self.current_plan()
        plan.fire(plan.after_val_epoch, self)

    def _loader_of(self, source: Any) -> Any:
        """``source``, which is what hooks see, with the interface of ``data.loader``."""
        for given, loader in zip(self._sources, self._loaders, strict=True):
            if given is source:
                return loader
        return as_loader(source)  # somebody calls train() or val() with another one

    def workflow_state(self) -> dict[str, Any]:
        return {"entries": self._workflow, "flow": self._flow, "done": self._flow_done + (self._uncounted == "epoch")}

    def loader_states(self) -> list[dict[str, Any]]:
        position = self.finished_iters - self._first_iter if self._midway else 0
        return [
            loader.state_at(self.finished_epochs, position if number == self._flow else 0)
            for number, loader in enumerate(self._loaders)
        ]

    def save_checkpoint(
        self,
        out_dir: str,
        filename_tmpl: str = "epoch_{}.pth",
        save_optimizer: bool = True,
        meta: dict[str, Any] | None = None,
        create_symlink: bool = True,
    ) -> None:
        """Write ``<out_dir>/<filename_tmpl with epoch + 1>``, and point ``latest.pth`` at it.

        Args:
            meta: gets runner.meta, ``epoch`` and ``iter`` added.
        Raises:
            TypeError: ``meta`` is not a dict.
        """
        self._save(out_dir, filename_tmpl.format(self.epoch + 1), meta, save_optimizer, create_symlink)


@RUNNERS.register_module()
class Runner(EpochBasedRunner):
    """MMCV's old name of EpochBasedRunner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn("Runner was deprecated, please use EpochBasedRunner", DeprecationWarning, stacklevel=2)
        super().__init__(*args, **kwargs)
