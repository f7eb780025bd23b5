"""Sources of batches: what every backend implements, the endless ``IterLoader``, ``build_dataloader``.

A source is any iterable with a length. :func:`as_loader` gives each of them the same face:

    len(loader)                batches a whole epoch on this rank
    start(epoch, position)     an iterator over the batches of ``epoch`` from number ``position`` on
    iter(loader)               the next epoch, or from where ``seek`` has pointed to
    epoch, position            of the batch that comes next; after an epoch's last batch: (epoch, len(loader))
    seek(epoch, position=0)    where the next ``iter()`` starts; nothing that is skipped is made
    set_epoch(epoch)           as of torch's samplers
    state_dict()               plain types, O(1): what ``load_state_dict`` needs to go on there, on any number of ranks
    state_at(epoch, position)  the same for another place: a runner counts what is used, not what was handed over
    close()                    threads, processes and slots are gone; iterating again brings new ones
    num_ready                  batches that can be taken without waiting; None where nobody can tell. It is logged
    prefetch_over_epoch_end    whether the next epoch's batches may be made while this one is used. A runner sets it
                               where no hook can touch the data between epochs; False at first

Ours are :class:`EpochLoader` s; any other source is wrapped (``foreign.ForeignLoader``). The endless form is the epoch
form over and over: :class:`IterLoader` calls ``start`` for each epoch.

Batches are as users make them: dicts, tuples, DataContainers. Tensors are handed over in the memory that they were
made in; everything else goes by reference. A batch is yours as long as you keep it.

To write a backend, derive from :class:`EpochLoader`, give it an ``order`` (a ``BatchOrder``), and write

    _start(epoch, position)    be ready to give that batch; what was made ahead and does not begin there is dropped
    _next()                    the next batch, waiting for it where it must; never asked for more than the epoch has
    _stop()                    end threads and processes, free memory; called twice it does nothing

A backend that makes batches ahead takes from ``_places(epoch, position)`` which ones, and calls ``_advance()`` for each
that it hands over; ``_goes_on(epoch, position)`` then tells ``_start`` whether there is nothing to be done.

An exception from ``_start`` or ``_next`` closes the loader and goes on to the caller.
"""

from __future__ import annotations

import functools
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from ..dist import get_dist_info
from ..registry import DATASETS, build_from_cfg
from .container import collate
from .foreign import ForeignLoader, set_epoch
from .order import BatchOrder

_logger = logging.getLogger("fastrunner")


class TakenOver(RuntimeError):
    """An iterator was asked for a batch after its loader had been started elsewhere."""


class EpochLoader(ABC):
    """Base of the loaders made by fastrunner; see the top of this file. One iterator is valid at a time.

    Attributes:
        order: which samples make which batch.
        epoch, position: of the batch that comes next.
    """

    order: BatchOrder
    prefetch_over_epoch_end: bool = False
    epoch: int = 0
    position: int = 0
    _fresh: bool = True  # nothing was taken since the last seek: the next iter() starts here, not at the next epoch
    _token: object = None  # of the iterator that is valid
    _endless: bool = False  # what is made ahead goes over epoch ends
    _ahead: tuple[int, int] | None = None  # epoch and position of what comes next out of a backend that is at work

    @abstractmethod
    def _start(self, epoch: int, position: int) -> None: ...

    @abstractmethod
    def _next(self) -> Any: ...

    def _places(self, epoch: int, position: int) -> Iterator[tuple[int, int]]:
        """(epoch, position) of the batches to make, from here on: to the epoch's end, or without end."""
        self._endless, self._ahead = self.prefetch_over_epoch_end, (epoch, position)
        return _places(self.order, epoch, position, self._endless)  # without self, lest a thread keep it alive

    def _goes_on(self, epoch: int, position: int) -> bool:
        """Whether what is being made is what is asked for. Leave to work over an epoch's end may be gone by then."""
        if self._ahead != (epoch, position):
            return False
        return position > 0 or (self._endless and self.prefetch_over_epoch_end)

    def _advance(self) -> None:
        """A batch was handed over."""
        assert self._ahead is not None  # _places came before
        epoch, position = self._ahead
        last = position + 1 == self.order.num_batches(epoch)
        self._ahead = (epoch + 1, 0) if last else (epoch, position + 1)

    def _epoch_over(self) -> None:  # noqa: B027  # for backends that keep something they need within an epoch only
        """The epoch's last batch is used."""

    def _stop(self) -> None:  # noqa: B027  # most backends have something to end, not all
        pass

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_ready(self) -> int | None:
        """Batches that can be taken without waiting; None where nobody can tell."""
        return None

    @property
    def seed(self) -> int:
        """Seed of order and augmentation. Setting another one drops what was made ahead."""
        return self.order.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        if seed != self.order.seed:
            self.close()
            self.order.seed = seed

    def seek(self, epoch: int, position: int = 0) -> None:
        """Let the next ``iter()`` start at batch ``position`` of ``epoch``: O(1), and nothing skipped is made.

        Raises:
            ValueError: no such batch. ``position == len(self)`` is the end of the epoch.
        """
        if epoch < 0 or not 0 <= position <= len(self):
            raise ValueError(f"no batch {position} in epoch {epoch}: an epoch has {len(self)} batches")
        self.epoch, self.position = epoch, position
        self._fresh, self._token = True, None

    def set_epoch(self, epoch: int) -> None:
        """As of torch's samplers. A loader that is in that epoch already stays where it is."""
        if epoch != self.epoch:
            self.seek(epoch)

    def start(self, epoch: int, position: int = 0) -> Iterator[Any]:
        """The batches of ``epoch`` from ``position`` on; none at its end."""
        self.seek(epoch, position)
        return iter(self)

    def __iter__(self) -> Iterator[Any]:
        if not self._fresh:
            self.epoch, self.position = self.epoch + 1, 0
        self._fresh = False
        self._token = token = object()
        return self._batches(token)

    def _batches(self, token: object) -> Iterator[Any]:
        count = self.order.num_batches(self.epoch)
        try:
            if self.position < count and self._token is token:
                self._start(self.epoch, self.position)
            while True:
                if self._token is not token:
                    raise TakenOver(
                        f"this iterator of a {type(self).__name__} is no longer valid: iter(), seek() or close() was "
                        "called after it; two loops over the same data need a loader each"
                    )
                if self.position >= count:
                    self._epoch_over()
                    return
                batch = self._next()
                self.position += 1
                yield batch
                del batch  # whoever took it may be done with it, and its memory can be used again
        except TakenOver:
            raise
        except Exception:
            self.close()
            raise

    def state_dict(self) -> dict[str, Any]:
        return self.state_at(self.epoch, self.position)

    def state_at(self, epoch: int, position: int) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue with batch ``position`` of ``epoch``."""
        return {
            "epoch": epoch,
            "position": position,
            "samples": self.order.samples_before(epoch, position),
            "num_samples": self.order.num_samples,
            "seed": int(self.seed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, also where batch_size or the number of ranks has changed.

        Data of another size has another order: then the epoch goes on with the same share of it, and the log says so.
        """
        self.seed = state.get("seed", self.seed)
        epoch, position = state["epoch"], state["position"]
        samples = state.get("samples", position * self.order.stride)  # not 0 at position 0 of an epoch that goes on
        if state.get("num_samples", self.order.num_samples) != self.order.num_samples:
            _logger.warning(
                f"the data had {state['num_samples']} samples when this was saved, and has {self.order.num_samples} "
                "now: the order of samples is another one"
            )
        before = self.order.shifted
        position = min(self.order.go_on(epoch, samples), len(self))
        if self.order.shifted != before:
            self.close()  # what was made ahead are other samples
        self.seek(epoch, position)

    def close(self) -> None:
        """End threads and processes, free the memory. Iterating again brings new ones."""
        self._token = self._ahead = None
        self._stop()


def _places(order: BatchOrder, epoch: int, position: int, endless: bool) -> Iterator[tuple[int, int]]:
    while True:
        for number in range(position, order.num_batches(epoch)):
            yield epoch, number
        if not endless:
            return
        epoch, position = epoch + 1, 0


def as_loader(source: Any) -> Any:
    """``source`` with the interface at the top of this file: itself where it has it, else wrapped.

    Raises:
        TypeError: it has no length, or cannot be iterated.
        ValueError: it is empty.
    """
    if isinstance(source, (EpochLoader, ForeignLoader)):
        return source
    check_source(source)
    return ForeignLoader(source)


def start_epoch(source: Any, epoch: int, position: int = 0) -> Iterator[Any]:
    """An iterator over ``epoch`` of any ``source`` from batch ``position`` on; see :func:`as_loader`."""
    batches: Iterator[Any] = as_loader(source).start(epoch, position)
    return batches


class IterLoader:
    """An endless iterator over a source; starts the next epoch when one is used up.

    Args:
        dataloader: any iterable with a length; its iterator is made at the first ``next()``.
    Raises:
        TypeError: it has no length, or cannot be iterated.
        ValueError: it is empty.
    Attributes:
        epoch: epochs used up.
        position: batches taken from the current epoch.
    """

    def __init__(self, dataloader: Any) -> None:
        self._loader = as_loader(dataloader)
        self._dataloader = dataloader
        self._batches: Iterator[Any] | None = None
        self._returned: list[Any] = []
        self._with_returned: Iterator[Any] | None = None  # those, then the others of the epoch
        self._others: Iterator[Any] = iter(())
        self.epoch = 0  # plain attributes, not properties: read in every iteration
        self.position = 0

    @property
    def dataloader(self) -> Any:
        """The source itself."""
        return self._dataloader

    @property
    def prefetch_over_epoch_end(self) -> bool:
        return bool(self._loader.prefetch_over_epoch_end)

    @prefetch_over_epoch_end.setter
    def prefetch_over_epoch_end(self, allowed: bool) -> None:
        self._loader.prefetch_over_epoch_end = allowed

    @property
    def num_ready(self) -> int | None:
        """Batches that can be taken without waiting; None where nobody can tell."""
        ready: int | None = getattr(self._loader, "num_ready", None)
        return ready

    def seek(self, epoch: int, position: int = 0) -> None:
        """Let the next batch be number ``position`` of ``epoch``."""
        self.epoch, self.position = epoch, position
        self._batches = None

    def set_epoch(self, epoch: int) -> None:
        """As of torch's samplers. In that epoch already it stays where it is."""
        if epoch != self.epoch:
            self.seek(epoch)

    def __next__(self) -> Any:
        if self._batches is None:
            self._open()
        try:
            batch = next(self._batches)  # type: ignore[arg-type]
        except StopIteration:
            batch = self._wrap()
        except TakenOver:  # another IterLoader has the same source: both get their own batches, none ahead of time
            self._batches = None
            return next(self)
        self.position += 1
        return batch

    @property
    def at_hand(self) -> int:
        """Batches of this epoch that ``take`` may take: they exist, so that no code of a user's makes them early."""
        if self._batches is None or (left := len(self) - self.position) <= 0:
            return 0
        if type(self._dataloader) in (list, tuple):
            return left
        return min(left, self.num_ready or 0) if isinstance(self._loader, EpochLoader) else 0

    @property
    def lies_ready(self) -> bool:
        """Whether ``at_hand`` may be more than 0 in this epoch: where it may not, nobody has to ask again."""
        if type(self._dataloader) in (list, tuple):
            return True
        return isinstance(self._loader, EpochLoader) and self.num_ready is not None

    def take(self, taken: list[Any], count: int) -> None:
        """Append up to ``count`` batches of this epoch to ``taken``. What goes wrong goes wrong at the next ``next()``.

        Whatever interrupts it, ``position`` counts what is in ``taken``.
        """
        before = len(taken)
        try:
            taken.extend(itertools.islice(self._batches or (), count))
        except TakenOver:
            self._batches = None
        except Exception as error:
            self._batches = _raising(error)
        finally:
            self.position += len(taken) - before

    def give_back(self, batches: list[Any]) -> None:
        """Let these, the last that were taken in this epoch, come again."""
        if not batches:
            return
        self.position -= len(batches)
        if self._batches is None:  # they will be made again
            return
        if self._batches is not self._with_returned:
            self._others, self._returned = self._batches, []
        self._returned[:0] = batches
        self._batches = self._with_returned = itertools.chain(_emptying(self._returned), self._others)

    def _open(self) -> None:
        if self.epoch:
            set_epoch(self._dataloader, self.epoch)
        self._batches = self._loader.start(self.epoch, self.position)

    def _wrap(self) -> Any:
        """Start the next epoch and take its first batch."""
        self.epoch += 1
        self.position = 0
        set_epoch(self._dataloader, self.epoch)
        self._batches = self._loader.start(self.epoch)
        for batch in self._batches:
            return batch
        raise ValueError(f"the data loader gives no batch in epoch {self.epoch}, though its length is {len(self)}")

    def state_dict(self, unused: int = 0) -> dict[str, Any]:
        """Where the data is.

        Args:
            unused: 1 where the batch that was taken last does not count: its iteration is not finished.
        """
        return self.state_at(self.epoch, self.position - unused)

    def state_at(self, epoch: int, position: int) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_at(epoch, position)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._loader.load_state_dict(state)
        self.seek(self._loader.epoch, self._loader.position)

    def close(self) -> None:
        """Let go of the iterator, and of the threads and processes behind it; the next batch starts it again there."""
        self._batches = None
        self._loader.close()

    def __iter__(self) -> IterLoader:
        return self

    def __len__(self) -> int:
        return len(self._dataloader)


def _emptying(batches: list[Any]) -> Iterator[Any]:
    while batches:
        yield batches.pop(0)


def _raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


def check_source(source: Any, name: str = "the data loader") -> None:
    """Raise unless ``source`` can be iterated, has a length, and is not empty."""
    if not hasattr(source, "__len__") or not hasattr(source, "__iter__"):
        raise TypeError(f"{name} must be an iterable with a length (a DataLoader, a list), got {type(source).__name__}")
    if len(source) == 0:
        raise ValueError(f"{name} is empty: its data set has no samples, or fewer than a batch with drop_last=True")


def build_dataloader(
    dataset: Any,
    samples_per_gpu: int,
    workers_per_gpu: int,
    num_gpus: int = 1,
    dist: bool | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    drop_last: bool = False,
    **kwargs: Any,
) -> Any:
    """The fastest loader for ``dataset``: its own (``make_loader``), or a torch DataLoader that can seek.

    Args:
        dataset: a map-style data set, or a dict that DATASETS builds one from. For an IterableDataset, and with a
            ``sampler`` or ``batch_sampler`` of your own, you get a DataLoader in that order: see
            :class:`~fastrunner.data.sampled_loader.SampledLoader`; ``shuffle`` has no effect.
        samples_per_gpu: batch_size of each GPU; without ``dist`` a batch has ``num_gpus`` times as many.
        workers_per_gpu: worker processes or threads for each GPU.
        dist: give each rank its share; None: where a process group is up.
        seed: of the order; None takes torch's initial seed, so ``torch.manual_seed`` decides. Rank 0's counts.
        **kwargs: for the loader: see :class:`~fastrunner.data.torch_loader.TorchLoader`. Its ``collate_fn`` is
            :func:`~fastrunner.data.container.collate` by default: torch's, which knows DataContainers.
    Returns:
        An :class:`EpochLoader` with ``dataset`` and ``batch_size``, or a SampledLoader.
    Raises:
        TypeError, ValueError: counts that are not ints, or not positive; an empty data set.
    """
    for name, count, least in (
        ("samples_per_gpu", samples_per_gpu, 1),
        ("workers_per_gpu", workers_per_gpu, 0),
        ("num_gpus", num_gpus, 1),
    ):
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} must be an int, got {type(count).__name__}")
        if count < least:
            raise ValueError(f"{name} must be >= {least}, got {count}")
    if isinstance(dataset, dict):
        dataset = build_from_cfg(dataset, DATASETS)
    rank, world_size = get_dist_info() if dist is not False else (0, 1)
    if world_size > 1:
        num_gpus = 1  # one process a GPU
    make_loader = getattr(dataset, "make_loader", None)
    if make_loader is None:
        from .sampled_loader import make_sampled_loader, needs_own_sampler
        from .torch_loader import TorchLoader

        kwargs.setdefault("collate_fn", functools.partial(collate, samples_per_gpu=samples_per_gpu))

        def make_loader(**options: Any) -> Any:
            make: Any = make_sampled_loader if needs_own_sampler(dataset, kwargs) else TorchLoader
            return make(dataset, **options)

    return make_loader(
        batch_size=num_gpus * samples_per_gpu,
        num_workers=num_gpus * workers_per_gpu,
        shuffle=shuffle,
        seed=_shared_seed(world_size) if seed is None else int(seed),
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
        **kwargs,
    )


def _shared_seed(world_size: int) -> int:
    """Torch's initial seed, the same on every rank, small enough for every generator."""
    seed = torch.initial_seed() % 2**31
    if world_size > 1:
        shared = [seed]
        torch.distributed.broadcast_object_list(shared, src=0)
        seed = shared[0]
    return seed
