"""When checkpoints are written, and which old ones go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..checkpoint.ranks import rank_file, save_rank
from ..dist import allreduce_params
from ..registry import HOOKS
from ..spelling import check_keys, parameters, takes_any
from .folders import check_local, numbered, run_folder
from .hook import NEVER, Hook, warn_of_no_epochs

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Saves checkpoints on rank 0; register it on every rank: the others save their random states beside.

    Args:
        interval: epochs or iterations between two checkpoints; -1: none but the last.
        by_epoch: count epochs; otherwise iterations.
        save_optimizer: put the optimizer's state into the file.
        out_dir: folder for a subfolder named as the work_dir; by default the work_dir itself.
        max_keep_ckpts: once a new one is on disk, keep only this many, those of the highest numbers up to it, of the
            files that its name template makes; -1 keeps all.
        save_last: also save after the last epoch or iteration, and when ``runner.stop()`` ends the run.
        sync_buffer: average the model's floating-point buffers over the ranks first.
        file_client_args: only None and ``dict(backend="disk")``.
        **kwargs: further arguments of ``runner.save_checkpoint``, e.g. ``filename_tmpl``, ``create_symlink``, ``meta``.
    Raises:
        ValueError: a remote ``out_dir`` or backend.
        KeyError: before the run: an argument that ``runner.save_checkpoint`` does not know.
    """

    def __init__(
        self,
        interval: int = -1,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        out_dir: str | None = None,
        max_keep_ckpts: int = -1,
        save_last: bool = True,
        sync_buffer: bool = False,
        file_client_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_local(out_dir, file_client_args)
        self.interval = interval
        self.by_epoch = by_epoch
        self.save_optimizer = save_optimizer
        self.out_dir = self._given_out_dir = out_dir
        self.max_keep_ckpts = max_keep_ckpts
        self.save_last = save_last
        self.sync_buffer = sync_buffer
        self.args = kwargs
        self._saved_iter = -1  # counted iterations of the newest checkpoint

    def before_run(self, runner: BaseRunner) -> None:
        warn_of_no_epochs(self, runner, "it will save nothing")
        if not takes_any(runner.save_checkpoint):  # at the first save it would be late: hours may have passed
            check_keys(self.args, [*parameters(runner.save_checkpoint), *parameters(type(self))], type(self).__name__)
        self.out_dir = run_folder(runner, self._given_out_dir)
        if self.out_dir != runner.work_dir:
            runner.logger.info(f"Checkpoints will be saved to {self.out_dir}.")

    def after_train_epoch(self, runner: BaseRunner) -> None:
        if not self.by_epoch:
            return
        if self.every_n_epochs(runner, self.interval) or (self.save_last and self.is_last_epoch(runner)):
            runner.logger.info(f"Saving checkpoint at {runner.epoch + 1} epochs")
            self._sync_and_save(runner)

    def after_train_iter(self, runner: BaseRunner) -> None:
        if self.by_epoch:
            return
        if self.every_n_iters(runner, self.interval) or (self.save_last and self.is_last_iter(runner)):
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._sync_and_save(runner)

    due_if_alone = True  # a user's hook may change the interval

    def due(self, runner: BaseRunner) -> int:
        if self.by_epoch:
            return NEVER  # not at iterations
        last = runner._max_iters - 1 if self.save_last and runner._max_iters is not None else NEVER
        nearest = runner.iter + -(runner.iter + 1) % self.interval if self.interval > 0 else NEVER
        return min(nearest, last) if last >= runner.iter else nearest

    def after_run(self, runner: BaseRunner) -> None:
        if runner.stop_reason is not None and self.save_last and self._saved_iter != runner.iter:
            runner.logger.info(f"Saving checkpoint at {runner.iter} iterations, where the run was stopped")
            # The counters have moved on already: the number of finished iterations is iter itself.
            self._sync_and_save(runner, filename_tmpl=f"iter_{runner.iter}.pth")

    def _sync_and_save(self, runner: BaseRunner, **kwargs: Any) -> None:
        if self.sync_buffer:
            allreduce_params(runner.model.buffers())
        self._save_checkpoint(runner, **kwargs)
        self._saved_iter = runner.finished_iters  # on every rank, or one would go into a collective alone

    def _save_checkpoint(self, runner: BaseRunner, **kwargs: Any) -> None:
        """Save, note the path in ``meta.hook_msgs.last_ckpt``, then delete what is too old."""
        assert self.out_dir is not None
        current = runner.epoch + 1 if self.by_epoch else runner.iter + 1
        name_of = self.args.get("filename_tmpl", "epoch_{}.pth" if self.by_epoch else "iter_{}.pth")
        filename = kwargs.get("filename_tmpl", name_of.format(current))
        path = os.path.join(self.out_dir, filename)
        if runner.rank != 0:
            save_rank(runner, path)
        else:
            # The runner's own template counts its own unit, so the name is given whole.
            whole = filename.replace("{", "{{").replace("}", "}}")
            args = {"save_optimizer": self.save_optimizer, **self.args, "filename_tmpl": whole}
            runner.save_checkpoint(self.out_dir, **args)
        if runner.meta is not None:
            runner.meta.setdefault("hook_msgs", {})["last_ckpt"] = path
        if self.max_keep_ckpts > 0 and "filename_tmpl" not in kwargs:
            self._delete_old(runner.rank, name_of, current)

    def _delete_old(self, rank: int, name_of: str, current: int) -> None:
        """Each rank what it has written itself: rank 0 the checkpoints, another the file beside."""
        assert self.out_dir is not None
        kept = os.path.join(self.out_dir, name_of)
        folder, name_of = os.path.split(rank_file(kept, rank) if rank else kept)
        saved = numbered(folder, name_of)
        for number in sorted(n for n in saved if n <= current)[: -self.max_keep_ckpts]:
            os.remove(saved[number])
