"""The process group as a runner sees it: rank, world_size, work for rank 0 only, averages over ranks.

Everything here works without a process group: then rank is 0, world_size is 1 and the averages change nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def get_dist_info() -> tuple[int, int]:
    """``(rank, world_size)`` of the default process group; ``(0, 1)`` where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def master_only(func: Callable[P, R]) -> Callable[P, R | None]:
    """Let ``func`` run on rank 0 only; elsewhere the call returns None. The rank is looked up at each call."""

    @functools.wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return func(*args, **kwargs) if get_dist_info()[0] == 0 else None

    return wrapper


@torch.no_grad()
def allreduce_params(params: Iterable[Tensor], coalesce: bool = True, bucket_size_mb: int = -1) -> None:
    """Replace every tensor by its mean over all ranks, in place; nothing happens at world size 1.

    Integer tensors (BatchNorm's ``num_batches_tracked``) count the same steps on every rank and are left alone: a mean
    of counters has no meaning, and dividing them in place is an error on today's torch.

    Args:
        params: tensors of any shapes, in the same order on every rank.
        coalesce: send one flat buffer per dtype instead of one message per tensor.
        bucket_size_mb: upper bound of such a buffer in MiB; not positive means no bound.
    """
    _, world_size = get_dist_info()
    if world_size == 1:
        return
    tensors = [p.data for p in params if p.is_floating_point() or p.is_complex()]
    for bucket in _buckets(tensors, bucket_size_mb) if coalesce else ([t] for t in tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat.div_(world_size))
        offset = 0
        for tensor in bucket:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()


def allreduce_grads(params: Iterable[nn.Parameter], coalesce: bool = True, bucket_size_mb: int = -1) -> None:
    """:func:`allreduce_params` for the gradients of the parameters that have one."""
    allreduce_params([p.grad for p in params if p.requires_grad and p.grad is not None], coalesce, bucket_size_mb)


def _buckets(tensors: list[Tensor], bucket_size_mb: int) -> Iterable[list[Tensor]]:
    """Consecutive tensors of one dtype and device, split where a bucket would pass its size."""
    limit = bucket_size_mb * 2**20 if bucket_size_mb > 0 else None
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        bucket: list[Tensor] = []
        size_bytes = 0
        for tensor in group:
            nbytes = tensor.numel() * tensor.element_size()
            if bucket and limit is not None and size_bytes + nbytes > limit:
                yield bucket
                bucket, size_bytes = [], 0
            bucket.append(tensor)
            size_bytes += nbytes
        yield bucket
