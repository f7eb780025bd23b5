"""Loaders that fastrunner did not make: a list, a torch DataLoader with any sampler.

They cannot seek, but they need not decode. What an epoch's order follows from is noted when it starts: the global
generators, the loader's own one, the sampler's ``state_dict``. To start in the middle, they are put back and the
*sampler* is run to the position; no sample is loaded. So ``DataLoader(shuffle=True)`` goes on with the same samples.
What is no DataLoader over a map-style data set is walked: its batches are made and dropped. The log says how long
either took. A source with ``seek(epoch, position)`` of its own does it itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from . import rng
from .sampled_loader import SampledLoader

_logger = logging.getLogger("fastrunner")


def set_epoch(source: Any, epoch: int) -> None:
    """Tell a foreign source's sampler, or its batch sampler's, which epoch it is; nothing where it cannot be told."""
    samplers = (getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None))
    for sampler in samplers:
        tell = getattr(sampler, "set_epoch", None)
        if tell is not None:
            tell(epoch)
            return


class ForeignLoader:
    """Any iterable with a length, with the interface of ``loader``'s top. Each ``start`` makes a new iterator.

    Attributes:
        epoch, position: where the last ``start`` or ``load_state_dict`` was; batches are counted by who takes them.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.epoch = self.position = 0
        self._runs_indices = isinstance(source, DataLoader) and _has_indices(source)
        self._begin: tuple[int, dict[str, Any]] | None = None  # (epoch, what its order followed from)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        return self.start(self.epoch, self.position)

    @property
    def prefetch_over_epoch_end(self) -> bool:
        """Passed on to a source that knows it. Others are never started early: that would draw random numbers early."""
        return bool(getattr(self.source, "prefetch_over_epoch_end", False))

    @prefetch_over_epoch_end.setter
    def prefetch_over_epoch_end(self, allowed: bool) -> None:
        if hasattr(self.source, "prefetch_over_epoch_end"):
            self.source.prefetch_over_epoch_end = allowed

    def seek(self, epoch: int, position: int = 0) -> None:
        self.epoch, self.position = epoch, position

    def set_epoch(self, epoch: int) -> None:
        set_epoch(self.source, epoch)

    def start(self, epoch: int, position: int = 0) -> Iterator[Any]:
        """The batches of ``epoch`` from ``position`` on. In the middle the global generators stay as they were: what
        the epoch's beginning drew is in their state already.

        Raises:
            ValueError: the source ends before ``position``.
        """
        self.seek(epoch, position)
        if isinstance(self.source, SampledLoader):
            self.source.epoch = epoch
        if callable(getattr(self.source, "seek", None)):
            self.source.seek(epoch, position)
            return iter(self.source)
        if position == 0:
            if self._runs_indices:
                self._begin = (epoch, _order_state(self.source))
            return iter(self.source)
        if position == len(self.source) and not self._runs_indices:
            return iter(())
        kept, begin = rng.capture(), time.perf_counter()
        try:
            batches = self._run_indices(epoch, position) if self._runs_indices else self._walk(epoch, position)
        finally:
            rng.put_back(kept)
        what = "ran the sampler over" if self._runs_indices else "made and dropped"
        _logger.info(
            f"{what} {position} batches in {time.perf_counter() - begin:.3f} s to resume; a loader from "
            "build_dataloader would seek"
        )
        return batches

    def _walk(self, epoch: int, position: int) -> Iterator[Any]:
        batches: Iterator[Any] = iter(self.source)
        for skipped in range(position):
            try:
                next(batches)
            except StopIteration:
                raise _too_short(epoch, position, skipped) from None
        return batches

    def _run_indices(self, epoch: int, position: int) -> Iterator[Any]:
        """As if the epoch had begun and ``position`` batches were used, but none of them is loaded."""
        if self._begin is not None and self._begin[0] == epoch:
            _set_order_state(self.source, self._begin[1])
        later = _Later(self.source.batch_sampler, epoch, position)
        if isinstance(self.source, SampledLoader):
            batches = self.source.over(later)
        else:
            batches = iter(_with_batch_sampler(self.source, later))
        later.skip()  # worker processes have asked for indices already, and with them for this
        return batches

    def state_at(self, epoch: int, position: int) -> dict[str, Any]:
        state: dict[str, Any] = {"epoch": epoch, "position": position}
        seed = getattr(self.source, "seed", None)
        if isinstance(seed, (int, np.integer)):
            state["seed"] = int(seed)
        if not self._runs_indices:
            return state
        if position == 0:  # the epoch is still to begin, with what generators and samplers of its own hold now
            begin = _order_state(self.source)
            del begin["global"]
            if any(begin.values()):
                state["begin"] = begin
        elif self._begin is not None and self._begin[0] == epoch:
            begin = self._begin[1]
            state["begin"] = {**begin, "global": rng.plain(begin["global"])}
        return state

    def state_dict(self) -> dict[str, Any]:
        return self.state_at(self.epoch, self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seek(state["epoch"], state["position"])
        if "seed" in state and hasattr(self.source, "seed"):
            self.source.seed = state["seed"]
        if "begin" in state and self._runs_indices:
            begin = state["begin"]
            if "global" in begin:
                self._begin = (state["epoch"], {**begin, "global": rng.from_plain(begin["global"])})
            else:
                _set_order_state(self.source, begin)

    def close(self) -> None:
        """Nothing: the iterators are the caller's, and end when they are dropped."""


def _has_indices(loader: DataLoader[Any]) -> bool:
    return not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def _too_short(epoch: int, position: int, skipped: int) -> ValueError:
    return ValueError(
        f"cannot resume at batch {position} of epoch {epoch}: the loader gave only {skipped} batches; "
        "resume with the data it was saved with"
    )


class _Later:
    """A batch sampler from batch ``position`` on. The first batches are asked for when torch would ask for them."""

    def __init__(self, batch_sampler: Any, epoch: int, position: int) -> None:
        self._sampler, self._epoch, self._position = batch_sampler, epoch, position
        self._batches: Iterator[Any] = iter(())
        self._skipped = True

    def __len__(self) -> int:
        return len(self._sampler) - self._position

    def __iter__(self) -> _Later:
        self._batches, self._skipped = iter(self._sampler), False
        return self

    def __next__(self) -> Any:
        self.skip()
        return next(self._batches)

    def skip(self) -> None:
        if self._skipped:
            return
        self._skipped = True
        for skipped in range(self._position):
            try:
                next(self._batches)
            except StopIteration:
                raise _too_short(self._epoch, self._position, skipped) from None


def _with_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A DataLoader like ``loader`` but for its batch sampler."""
    options: dict[str, Any] = {}
    if loader.num_workers > 0:
        options = {"prefetch_factor": loader.prefetch_factor, "multiprocessing_context": loader.multiprocessing_context}
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **options,
    )


def _parts_with(loader: DataLoader[Any], method: str) -> dict[str, Any]:
    """The sampler and batch sampler that have ``method``."""
    parts = {"sampler": loader.sampler, "batch_sampler": loader.batch_sampler}
    return {name: part for name, part in parts.items() if callable(getattr(part, method, None))}


def _generators(loader: DataLoader[Any]) -> dict[str, torch.Generator]:
    parts = {"loader": loader, "sampler": loader.sampler, "batch_sampler": loader.batch_sampler}
    found = {name: getattr(part, "generator", None) for name, part in parts.items()}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}


def _order_state(loader: DataLoader[Any]) -> dict[str, Any]:
    """What the order of the epoch that starts now follows from."""
    return {
        "global": rng.capture(),
        "generators": {name: generator.get_state() for name, generator in _generators(loader).items()},
        "samplers": {name: part.state_dict() for name, part in _parts_with(loader, "state_dict").items()},
    }


def _set_order_state(loader: DataLoader[Any], state: dict[str, Any]) -> None:
    if "global" in state:
        rng.put_back(state["global"])
    for name, generator in _generators(loader).items():
        if name in state["generators"]:
            generator.set_state(state["generators"][name].cpu())
    for name, part in _parts_with(loader, "load_state_dict").items():
        if name in state["samplers"]:
            part.load_state_dict(state["samplers"][name])
