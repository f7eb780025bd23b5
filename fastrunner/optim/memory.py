"""Which tensors lie in the same memory: they must not be updated in parallel, nor scaled twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor


def shared_memory(tensors: Iterable[Tensor]) -> set[int]:
    """ids of the tensors whose memory overlaps that of another one, or that are listed twice.

    torch updates such parameters one after the other; the core would do it in any order, and in two threads.
    """
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + _last_index(t)), id(t))
        for t in tensors
        if _has_memory(t) and t.numel() > 0
    )
    sharing: set[int] = set()
    furthest, owner = 0, 0
    for start, end, tensor in spans:
        if start < furthest:
            sharing |= {tensor, owner}
        if end > furthest:
            furthest, owner = end, tensor
    return sharing


def shared_gradients(params: Iterable[Tensor]) -> set[int]:
    """ids of the parameters whose ``.grad`` lies where another one's does."""
    owners: dict[int, list[int]] = {}
    for p in params:
        if p.grad is not None:
            owners.setdefault(home(p.grad), []).append(id(p))
    return {owner for group in owners.values() if len(group) > 1 for owner in group}


def check_allocated(name: str, what: str, tensor: object) -> None:
    """Raise RuntimeError if a tensor's storage was freed (``untyped_storage().resize_(0)``): torch would crash."""
    if _has_memory(tensor) and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        raise RuntimeError(f"{name}: its {what} has no memory, the storage was freed; give it back before the step")


def home(tensor: Tensor) -> int:
    """The same for tensors that begin in the same memory."""
    return tensor.data_ptr() if _has_memory(tensor) and tensor.numel() > 0 else id(tensor)


def _has_memory(tensor: object) -> TypeGuard[Tensor]:
    """Subclasses may wrap other tensors and have none of their own."""
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.layout == torch.strided and tensor.device.type in ("cpu", "cuda")


def _last_index(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
