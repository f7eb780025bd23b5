"""Batches whose parts differ in size: DataContainer, and how samples become batches and batches reach devices.

dataset: dict(img=DataContainer(tensor, stack=True), img_metas=DataContainer(dict, cpu_only=True), ...)
collate: one DataContainer a key; its data is a list with one entry a device: a padded batch, or a list of samples
scatter: each device gets its entry, moved there unless ``cpu_only``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

CPU = -1  # MMCV's name for the CPU in a list of GPU numbers


class DataContainer:
    """A value with instructions for :func:`collate` and :func:`scatter`.

    Args:
        data: anything; a tensor where ``stack``.
        stack: make one tensor of a device's samples, padding them to a common size.
        padding_value: what the padding consists of.
        cpu_only: never moved to a device, never stacked.
        pad_dims: how many dimensions, counted from the last, may differ between samples: 1, 2, 3, or None: none may.
    Raises:
        ValueError: another ``pad_dims``.
    """

    def __init__(
        self,
        data: Any,
        stack: bool = False,
        padding_value: float = 0,
        cpu_only: bool = False,
        pad_dims: int | None = 2,
    ) -> None:
        if pad_dims not in (None, 1, 2, 3):
            raise ValueError(f"pad_dims must be None, 1, 2 or 3, got {pad_dims!r}")
        self._data = data
        self._cpu_only = cpu_only
        self._stack = stack
        self._padding_value = padding_value
        self._pad_dims = pad_dims

    @property
    def data(self) -> Any:
        return self._data

    @property
    def datatype(self) -> type | str:
        """torch's name of the tensor's type ("torch.FloatTensor"), else the class of the data."""
        return self.data.type() if isinstance(self.data, Tensor) else type(self.data)

    @property
    def cpu_only(self) -> bool:
        return self._cpu_only

    @property
    def stack(self) -> bool:
        return self._stack

    @property
    def padding_value(self) -> float:
        return self._padding_value

    @property
    def pad_dims(self) -> int | None:
        return self._pad_dims

    def size(self, *args: Any, **kwargs: Any) -> Any:
        """Of the tensor inside. AttributeError: it is not a tensor."""
        return self._tensor("size").size(*args, **kwargs)

    def dim(self) -> int:
        """Of the tensor inside. AttributeError: it is not a tensor."""
        return self._tensor("dim").dim()

    def pin_memory(self) -> DataContainer:
        """Called by a DataLoader with ``pin_memory=True``; what stays on the CPU is not pinned."""
        return self if self.cpu_only else self.like(_each_tensor(self.data, lambda tensor: tensor.pin_memory()))

    def like(self, data: Any) -> DataContainer:
        """Other data under the same instructions."""
        return type(self)(data, self.stack, self.padding_value, self.cpu_only, self.pad_dims)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data!r})"

    def _tensor(self, asked: str) -> Tensor:
        if not isinstance(self.data, Tensor):
            raise AttributeError(f"{type(self).__name__} has no attribute {asked} for type {self.datatype}")
        return self.data


def _each_tensor(value: Any, do: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``do`` applied to its tensors, inside lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, (list, tuple)):
        items = [_each_tensor(item, do) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return {k: _each_tensor(v, do) for k, v in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------- samples -> batch


def collate(batch: Sequence[Any], samples_per_gpu: int = 1) -> Any:
    """Samples -> one batch; a drop-in ``collate_fn`` (``functools.partial(collate, samples_per_gpu=4)``).

    DataContainers are grouped by ``samples_per_gpu``, one entry of ``data`` a device; mappings are collated by key,
    sequences by position, the rest by torch's ``default_collate``.

    Raises:
        TypeError: ``batch`` is not a sequence.
        ValueError: samples to be stacked differ in more than their last ``pad_dims`` dimensions.
    """
    if not isinstance(batch, Sequence):
        raise TypeError(f"a batch must be a sequence of samples, got {type(batch).__name__}")
    first = batch[0]
    if isinstance(first, DataContainer):
        groups = [batch[i : i + samples_per_gpu] for i in range(0, len(batch), samples_per_gpu)]
        stacked = first.stack and not first.cpu_only
        return first.like([_stack(group) if stacked else [sample.data for sample in group] for group in groups])
    if isinstance(first, (str, bytes)):  # sequences too, but of no samples
        return default_collate(list(batch))
    if isinstance(first, Sequence):
        parts = [collate(samples, samples_per_gpu) for samples in zip(*batch, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else parts  # a namedtuple stays one
    if isinstance(first, Mapping):
        return {key: collate([sample[key] for sample in batch], samples_per_gpu) for key in first}
    return default_collate(list(batch))


def _stack(samples: Sequence[DataContainer]) -> Any:
    """(size...) each -> (samples, largest size...): padded on the right and at the bottom."""
    for sample in samples:
        if not isinstance(sample.data, Tensor):
            raise TypeError(f"only tensors can be stacked, got a {type(sample.data).__name__}")
    pad_dims = samples[0].pad_dims
    if pad_dims is None:
        return default_collate([sample.data for sample in samples])
    shapes = [tuple(sample.data.shape) for sample in samples]
    if len({(len(shape), shape[:-pad_dims]) for shape in shapes}) > 1 or len(shapes[0]) < pad_dims:
        raise ValueError(f"samples of shapes {shapes} differ in more than their last {pad_dims} dimensions (pad_dims)")
    largest = [max(sizes) for sizes in zip(*(shape[-pad_dims:] for shape in shapes), strict=True)]
    padded = []
    for sample, shape in zip(samples, shapes, strict=True):
        missing = [want - size for want, size in zip(largest, shape[-pad_dims:], strict=True)]
        widths = [width for lack in reversed(missing) for width in (0, lack)]  # torch counts from the last dimension
        padded.append(F.pad(sample.data, widths, value=sample.padding_value))
    return default_collate(padded)


# ---------------------------------------------------------------- batch -> devices


def scatter(inputs: Any, target_gpus: Sequence[int | torch.device], dim: int = 0) -> list[Any]:
    """``inputs`` for each device: tensors are split along ``dim``, DataContainers unwrapped, the rest is shared.

    Args:
        target_gpus: numbers of GPUs; ``[-1]`` is the CPU, where nothing is copied.
    Returns:
        One entry a device.
    Raises:
        ValueError: a DataContainer was collated for another number of devices.
    Cost: copies are queued on the current stream (``non_blocking``); from pinned memory the host does not wait.
    """
    targets = list(target_gpus)

    def walk(value: Any) -> list[Any]:
        if isinstance(value, Tensor):
            return _split(value, targets, dim)
        if isinstance(value, DataContainer):
            return _entries(value, targets)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            kind: Any = type(value)
            return [kind(*items) for items in _each(map(walk, value))]
        if isinstance(value, (tuple, list)) and value:
            return [type(value)(items) for items in _each(map(walk, value))]
        if isinstance(value, dict) and value:
            keys = list(value)
            return [type(value)(zip(keys, items, strict=True)) for items in _each(map(walk, value.values()))]
        return [value for _ in targets]

    return walk(inputs)


def _each(parts: Any) -> Any:
    """Devices of parts -> parts of devices. A tensor shorter than the number of devices ends the list for all."""
    return zip(*parts, strict=False)


def _split(value: Tensor, targets: list[Any], dim: int) -> list[Tensor]:
    if targets == [CPU]:
        return [value]
    if len(targets) == 1:
        return [_moved(value, targets[0])]
    from torch.nn.parallel.scatter_gather import scatter as torch_scatter  # keeps the graph of a split tensor

    return list(torch_scatter(value, targets, dim))


def _entries(value: DataContainer, targets: list[Any]) -> list[Any]:
    data = value.data
    if not isinstance(data, list) or len(data) != len(targets):
        count = len(data) if isinstance(data, list) else "no list of"
        raise ValueError(
            f"a DataContainer with {count} entries cannot go to {len(targets)} device(s): "
            "collate(batch, samples_per_gpu) makes one entry for each samples_per_gpu samples"
        )
    if value.cpu_only or targets == [CPU]:
        return data
    return [
        _each_tensor(entry, lambda tensor, device=device: _moved(tensor, device))  # type: ignore[misc]
        for entry, device in zip(data, targets, strict=True)
    ]


def _moved(tensor: Tensor, device: Any) -> Tensor:
    return tensor.to(torch.device("cuda", device) if isinstance(device, int) else device, non_blocking=True)


def scatter_kwargs(
    inputs: Any, kwargs: Any, target_gpus: Sequence[int | torch.device], dim: int = 0
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """:func:`scatter` of a call's arguments: ``(args of each device, kwargs of each device)``, equally many of both."""
    args = scatter(inputs, target_gpus, dim) if inputs else []
    named = scatter(kwargs, target_gpus, dim) if kwargs else []
    count = max(len(args), len(named))
    args += [()] * (count - len(args))
    named += [{}] * (count - len(named))
    return tuple(args), tuple(named)


__all__ = ["DataContainer", "collate", "scatter", "scatter_kwargs"]
