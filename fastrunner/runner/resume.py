"""Saving a run and continuing it: counters that are true at any moment, and the place in workflow and data."""

from __future__ import annotations

import logging
import os.path as osp
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint import load_checkpoint, save_checkpoint, state
from ..checkpoint.file import link_latest
from ..checkpoint.ranks import own_entry
from ..checkpoint.sources import load_for_resume, load_optimizer
from ..hooks.ema import averaged_weights
from .planned import Planned

Workflow = list[list[Any]]  # [mode, count] each
BEGINNING: dict[str, Any] = {"epoch": 0, "position": 0}  # of a data loader


class ResumeMixin(Planned):
    """The part of a runner that reads and writes checkpoints. Its attributes are set by ``BaseRunner``."""

    logger: logging.Logger
    meta: dict[str, Any] | None
    resumed_buffers: dict[str, Tensor]
    resumed_from: tuple[str, bool]  # path of the checkpoint, and whether it was trusted
    saved_iter: int
    _epoch: int
    _iter: int
    _inner_iter: int
    _rank: int
    _uncounted: str
    _resumed: dict[str, Any] | None
    _loaders: list[Any]
    _workflow: Workflow

    if TYPE_CHECKING:

        def workflow_state(self) -> dict[str, Any]: ...
        def loader_states(self) -> list[dict[str, Any]]: ...

    @property
    def finished_iters(self) -> int:
        """Iterations whose update is done, also while their ``after_train_iter`` hooks still run."""
        return self._iter + (self._uncounted == "iter")

    @property
    def finished_epochs(self) -> int:
        """Epochs whose batches are all used, also while their ``after_train_epoch`` hooks still run."""
        return self._epoch + (self._uncounted == "epoch")

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r"^module\.", ""),),
        *,
        trusted: bool = False,
    ) -> dict[str, Any]:
        """Load weights only; returns the file's content. See :func:`fastrunner.checkpoint.load_checkpoint`."""
        return load_checkpoint(
            self.model, filename, map_location, strict, self.logger, revise_keys=revise_keys, trusted=trusted
        )

    def resume(
        self, checkpoint: str, resume_optimizer: bool = True, map_location: Any = "default", *, trusted: bool = False
    ) -> None:
        """Continue where ``checkpoint`` was saved: weights, optimizer, counters, RNGs, hooks, position in the data.

        Files of MMCV 1.x have no ``resume`` entry: then counters come from ``meta``, and the epoch starts over.

        Args:
            map_location: "default": the current GPU where there is one, else the CPU.
            trusted: see :func:`fastrunner.checkpoint.file.read`.
        Raises:
            FileNotFoundError, RuntimeError: no such file, or a damaged one.
            KeyError: the file has no counters.
        """
        if map_location == "default":
            map_location = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        prefixes = tuple(p for p in (getattr(hook, "buffer_prefix", None) for hook in self._hooks) if p)
        content, self.resumed_buffers = load_for_resume(
            self.model, checkpoint, map_location, prefixes, self.logger, trusted
        )
        self.meta = meta = content["meta"]
        self.meta.setdefault("hook_msgs", {})
        if resume_optimizer and "optimizer" in content:
            load_optimizer(self.optimizer, content)
        if "resume" in content:
            state.restore(self, own_entry(content["resume"], checkpoint, self._rank))
            self._resumed = {key: content["resume"][key] for key in ("workflow", "loaders", "counters")}
        else:
            self._epoch, self._iter = meta["epoch"], _mmcv_iter(checkpoint, meta)
            self._resumed = None
        self._inner_iter = 0
        self.resumed_from = checkpoint, trusted
        self.logger.info(f"resumed epoch {self._epoch}, iter {self._iter} from {checkpoint}")

    def _save(
        self, out_dir: str, filename: str, meta: dict[str, Any] | None, save_optimizer: bool, create_symlink: bool
    ) -> None:
        if meta is not None and not isinstance(meta, dict):
            raise TypeError(f"meta must be a dict or None, got {type(meta).__name__}")
        for hook in self._hooks:
            write_meta = getattr(hook, "write_meta", None)
            if write_meta is not None:
                write_meta(self)
        meta = {} if meta is None else meta
        meta.update(self.meta or {})
        meta.update(
            epoch=self._epoch + 1, iter=self._iter
        )  # after runner.meta, which a resume has filled with old ones
        path = osp.join(out_dir, filename)
        optimizer = self.optimizer if save_optimizer else None
        with averaged_weights(self):
            save_checkpoint(self.model, path, optimizer, meta, resume=state.capture(self))
        if create_symlink:
            link_latest(out_dir, filename)
        self.saved_iter = self.finished_iters

    def _keep_place(self) -> None:
        """Let the next run() go on where this one was stopped."""
        self._resumed = {**self.place(), "counters": {"epoch": self._epoch, "iter": self._iter}}

    def place(self) -> dict[str, Any]:
        """Workflow and loaders, for a checkpoint written now. What was resumed and not begun is where it was."""
        resumed = self._resumed
        if resumed is not None and resumed["counters"] == {"epoch": self._epoch, "iter": self._iter}:
            return {key: resumed[key] for key in ("workflow", "loaders")}
        return {"workflow": self.workflow_state(), "loaders": self.loader_states()}

    def _take_resumed(self) -> tuple[int, int, list[int]]:
        """``(flow, done, positions)`` to start run() from, once; the beginning where nothing was resumed or stopped.

        The loaders are told where they were; ``positions`` are those in their epochs.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is None or resumed["counters"] != {"epoch": self._epoch, "iter": self._iter}:  # they were written
            return 0, 0, [0] * len(self._loaders)
        workflow = resumed["workflow"]
        places = by_mode(workflow["entries"], resumed["loaders"], self._workflow)
        for loader, place in zip(self._loaders, places, strict=True):
            loader.load_state_dict(place)
        positions = [loader.position for loader in self._loaders]
        if workflow["entries"] == self._workflow:
            return workflow["flow"], workflow["done"], positions
        warnings.warn(
            f"the checkpoint was saved with workflow {workflow['entries']}, this run has {self._workflow}: it starts "
            "with its first entry, and each loader goes on where the one of the same mode was",
            stacklevel=3,
        )
        return 0, 0, positions


def by_mode(entries: Workflow, states: list[dict[str, Any]], workflow: Workflow) -> list[dict[str, Any]]:
    """The states of a saved workflow's loaders, for those of another: its n-th of a mode gets the n-th of the mode."""
    saved: dict[str, list[dict[str, Any]]] = {}
    for (mode, _), loader in zip(entries, states, strict=True):
        saved.setdefault(mode, []).append(loader)
    return [saved[mode].pop(0) if saved.get(mode) else BEGINNING for mode, _ in workflow]


def _mmcv_iter(checkpoint: str, meta: dict[str, Any]) -> int:
    """MMCV's iteration runner names a file by the finished iterations and writes one less into its meta."""
    match = re.fullmatch(r"iter_(\d+)\.pth", osp.basename(osp.realpath(checkpoint)))
    written = int(meta["iter"])
    if match and "mmcv_version" in meta and written + 1 == int(match[1]):
        return written + 1
    return written
