"""The iteration runner: endless data, counted in iterations."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..data.loader import IterLoader
from ..hooks.logger.base import LoggerHook
from ..plan.lower import is_replaced
from ..registry import RUNNERS
from .base import BaseRunner, Workflow
from .register import TIMER

HISTORY = 1000  # entries of each logged value that are kept at least


@RUNNERS.register_module()
class IterBasedRunner(BaseRunner):
    """Trains iteration by iteration. A workflow entry ``("train", 2)`` is two iterations.

    ``before_epoch`` and ``after_epoch`` fire once, around the loop; no other epoch stage does.
    """

    _flow = 0  # entry of the workflow that runs
    _set_mode = True  # the next train iteration calls model.train(), whatever model.training says

    def run(self, data_loaders: list[Any], workflow: Workflow, max_iters: int | None = None, **kwargs: Any) -> None:
        """Run the workflow, over and over, until ``max_iters`` are trained.

        Args and errors: as :meth:`EpochBasedRunner.run`; each data loader becomes an :class:`IterLoader`.
        """
        if max_iters is not None:
            warnings.warn(
                "setting max_iters in run is deprecated, please set max_iters in runner_config",
                DeprecationWarning,
                stacklevel=2,
            )
            self._max_iters = max_iters
        self._begin(data_loaders, workflow, "_max_iters", "iters")
        with self._running():
            self._loaders = loaders = [IterLoader(source) for source in data_loaders]  # hooks may save
            self._before_run()
            flow, done, _ = self._take_resumed()
            self.data_loader = next(
                loader for loader, (mode, _) in zip(loaders, workflow, strict=True) if mode == "train"
            )
            self._set_mode = True
            self.call_hook("before_epoch")
            self.renew_plan()
            # Nothing clears the histories between epochs here; keep what loggers and users average over.
            self.log_buffer.window = max([HISTORY, *(h.interval for h in self._hooks if isinstance(h, LoggerHook))])

            self._flow, self._inner_iter = flow, done
            # of the round that was interrupted: its val entries follow its last iteration
            left = (flow, done) != (0, 0)
            while (left or self._iter < self._max_iters) and self.stop_reason is None:  # type: ignore[operator]
                left = False
                for self._flow in range(flow, len(workflow)):
                    self._run_entry(*workflow[self._flow], done, loaders[self._flow], len(workflow) == 1, kwargs)
                    done = 0
                    if self.stop_reason is not None:
                        break  # the place in the workflow stays where it is, for a checkpoint in after_run
                flow = 0
            self.call_hook("after_epoch")
            self.call_hook("after_run")

    def _run_entry(
        self, mode: str, iters: int, done: int, loader: IterLoader, alone: bool, kwargs: dict[str, Any]
    ) -> None:
        """One entry of the workflow, with ``done`` iterations behind us; over and over if it is the only one."""
        run_one, train = getattr(self, mode), mode == "train"
        self._inner_iter = done
        while self.stop_reason is None and not (train and self._iter >= self._max_iters):  # type: ignore[operator]
            if self._inner_iter >= iters:
                if not alone or self._iter >= self._max_iters:  # type: ignore[operator]
                    return  # inner_iter stays where it is, as in MMCV
                self._inner_iter = 0
            run_one(loader, **kwargs)
            if train and not is_replaced(self, "train"):
                self._train_quietly(loader, iters, alone)

    def _train_quietly(self, loader: IterLoader, iters: int, alone: bool) -> None:
        """Go on as ``train`` does until the next due point, or the entry's end.

        That is before ``_max_iters``. Hooks that are always called act within ``plan.quiet``; what they write makes the
        next iteration a due one.
        """
        plan, model, next_batch = self.current_plan(), self.model, loader.__next__
        bursts = plan.bursts if loader.lies_ready else None
        while self._iter < plan.next_due and model.training:
            if self._inner_iter >= iters:
                if not alone:
                    return
                self._inner_iter = 0
            if bursts is not None and bursts(self, loader, iters, alone):
                continue
            self.data_batch = next_batch()
            self._epoch = loader.epoch
            plan.quiet(self)
            del self.data_batch
            self._iter += 1
            self._inner_iter += 1

    def train(self, data_loader: Any, **kwargs: Any) -> None:
        """One iteration."""
        if self._set_mode or not self.model.training:
            self.model.train()  # walks all modules: only where something may have changed the mode
            self._set_mode = False
        self.mode = "train"
        self.data_loader = data_loader
        if kwargs or self.run_kwargs:
            self._pass_on(kwargs)
        self.data_batch = next(data_loader)
        self._epoch = data_loader.epoch
        plan = self.current_plan()
        if self._iter < plan.next_due:  # nobody is called: the iteration is the step
            plan.quiet(self)
        else:
            plan.at(self)(self)
        del self.data_batch
        self._iter += 1
        self._inner_iter += 1

    @torch.no_grad()
    def val(self, data_loader: Any, **kwargs: Any) -> None:
        """One batch without an update."""
        self.model.eval()
        self._set_mode = True
        self.mode = "val"
        self.data_loader = data_loader
        self.data_batch = next(data_loader)
        plan = self.current_plan()
        plan.fire(plan.before_val_iter, self)
        self.run_iter(self.data_batch, train_mode=False, **kwargs)
        plan.fire(plan.after_val_iter, self)
        plan.somebody_acted()
        del self.data_batch
        self._inner_iter += 1

    def _val_step(self, data_batch: Any, **kwargs: Any) -> Any:
        return self.model.val_step(data_batch, **kwargs)  # no optimizer here, unlike the epoch runner: as in MMCV

    def workflow_state(self) -> dict[str, Any]:
        return {"entries": self._workflow, "flow": self._flow, "done": self._inner_iter + (self._uncounted == "iter")}

    def loader_states(self) -> list[dict[str, Any]]:
        in_use = hasattr(self, "data_batch") and self._uncounted != "iter"  # its iteration will be done again
        return [loader.state_dict(unused=int(in_use and loader is self.data_loader)) for loader in self._loaders]

    def save_checkpoint(
        self,
        out_dir: str,
        filename_tmpl: str = "iter_{}.pth",
        meta: dict[str, Any] | None = None,
        save_optimizer: bool = True,
        create_symlink: bool = True,
    ) -> None:
        """Write ``<out_dir>/<filename_tmpl with iter + 1>``, and point ``latest.pth`` at it.

        The order of the arguments is MMCV's, and not EpochBasedRunner's.
        """
        self._save(out_dir, filename_tmpl.format(self.iter + 1), meta, save_optimizer, create_symlink)

    def register_training_hooks(
        self,
        lr_config: Any,
        optimizer_config: Any = None,
        checkpoint_config: Any = None,
        log_config: Any = None,
        momentum_config: Any = None,
        timer_config: Any = TIMER,
        custom_hooks_config: Any = None,
    ) -> None:
        """As the base method; lr, momentum, checkpoints and logs count iterations unless they say ``by_epoch``."""

        def by_iter(config: Any) -> Any:
            return {"by_epoch": False, **config} if isinstance(config, dict) else config

        if log_config is not None:
            log_config = {**log_config, "hooks": [by_iter(info) for info in log_config.get("hooks", ())]}
        super().register_training_hooks(
            lr_config=by_iter(lr_config),
            optimizer_config=optimizer_config,
            checkpoint_config=by_iter(checkpoint_config),
            log_config=log_config,
            momentum_config=by_iter(momentum_config),
            timer_config=timer_config,
            custom_hooks_config=custom_hooks_config,
        )
