"""What of a run recipe ``cudagraph`` captures: the module inside its wrapper, on the device, with its exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ..model.parallel import MMDataParallel, MMDistributedDataParallel, _to_device, is_module_wrapper
from .graph_backend import CudaBackend, GraphBackend
from .torch_private import Unfit

BUCKET_BYTES = 25 * 2**20  # as DDP's: the exchange of a bucket begins when its gradients are there


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next((param.device for param in model.parameters()), torch.device("cpu"))


def captures(model: Any) -> bool:
    """Whether the model is on a device with graphs."""
    return isinstance(model, nn.Module) and device_of(model).type == "cuda"


def backend_for(device: torch.device) -> GraphBackend:
    """What captures on a device.

    Raises:
        Unfit: nothing does.
    """
    if device.type != "cuda":
        raise Unfit(f"the model is on the {device.type.upper()}, and CUDA graphs are a GPU's")
    return CudaBackend(device)


class Inside(NamedTuple):
    """A run's model without its wrapper.

    Attributes:
        module: the model.
        place: the runner's batch -> the module's, on its device; None: they are the same.
        exchange: what the wrapper exchanges between ranks; None: nothing.
    """

    module: nn.Module
    place: Callable[[Any], Any] | None
    exchange: MeanOverRanks | None


def inside(model: nn.Module, collectives: str) -> Inside:
    """Look through the wrapper of a model.

    Args:
        collectives: the kind of process group whose collectives can be captured.
    Raises:
        Unfit: a wrapper that does other things, or another kind of group.
    """
    if type(model) is MMDataParallel:
        return Inside(model.module, lambda batch: model._on_device((batch,), {})[0][0], None)
    if type(model) is MMDistributedDataParallel:
        group: Any = model.process_group
        kind = distributed.get_backend(group)
        if kind != collectives:
            raise Unfit(f"the ranks exchange gradients by {kind}, which cannot be captured; {collectives} can")
        if model.find_unused_parameters or getattr(model, "static_graph", False):
            raise Unfit("the wrapper looks for unused parameters, or relies on a static graph")
        exchange = MeanOverRanks(group, buffers=model.broadcast_buffers)
        return Inside(
            model.module, lambda batch: _to_device((batch,), {}, model.device_ids or [], model.dim)[0][0], exchange
        )
    if is_module_wrapper(model):
        raise Unfit(f"the model is wrapped in a {type(model).__name__}, which does more than a graph would")
    return Inside(model, None, None)


class MeanOverRanks:
    """DDP's exchange, as operations of the step itself: gradients in buckets, buffers from rank 0.

    DDP's own hangs on nodes of autograd that remember the stream on which DDP was built, and on hooks, which a replay
    does not call. Each rank's gradients are divided before they are summed, as DDP does: the same bits for two ranks.

    Args:
        group: the process group.
        buffers: make the buffers those of rank 0 before each step.
    """

    def __init__(self, group: Any, *, buffers: bool) -> None:
        self._name, self.size, self._buffers = group.group_name, group.size(), buffers
        self._group = group

    def before(self, buffers: Sequence[Tensor]) -> None:
        if not self._buffers:
            return
        for each in _buckets(buffers):
            flat = torch.cat([buffer.reshape(-1) for buffer in each])
            _copy_back(self._wait(torch.ops._c10d_functional.broadcast_(flat, 0, self._name)), each)

    def mean(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        there = [grad for grad in grads if grad is not None]
        means: dict[int, Tensor] = {}
        for each in _buckets(there):
            flat = torch.cat([grad.reshape(-1) for grad in each]).div_(self.size)
            flat = self._wait(torch.ops._c10d_functional.all_reduce_(flat, "sum", self._name))
            pieces = torch.split(flat, [grad.numel() for grad in each])
            means |= {id(grad): piece.view_as(grad) for grad, piece in zip(each, pieces, strict=True)}
        return [None if grad is None else means[id(grad)] for grad in grads]

    def agree(self, values: Sequence[int], device: torch.device) -> bool:
        """Whether all ranks came here with the same values, of at most 62 bits. Waits for them."""
        mine = torch.tensor([*values, *(-value for value in values)], dtype=torch.int64, device=device)
        least = mine.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN, self._group)
        return torch.equal(least, mine)

    def _wait(self, tensor: Tensor) -> Tensor:
        waited: Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
        return waited


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype together, up to ``BUCKET_BYTES``."""
    found: list[list[Tensor]] = []
    open_ones: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        bucket, size = open_ones.get(tensor.dtype, ([], BUCKET_BYTES))
        if size >= BUCKET_BYTES:
            bucket, size = [], 0
            found.append(bucket)
        bucket.append(tensor)
        open_ones[tensor.dtype] = bucket, size + tensor.numel() * tensor.element_size()
    return found


def _copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, piece in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))
