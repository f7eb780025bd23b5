"""Module wrappers: which modules only carry another one, how to look through them, and MMCV's two.

``MMDataParallel`` is for one process and one device, ``MMDistributedDataParallel`` for one process a device. Both take
batches with DataContainers, put them on the device, and pass ``train_step`` and ``val_step`` on to the module inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..data.container import CPU, scatter_kwargs
from ..registry import MODULE_WRAPPERS, Registry

MODULE_WRAPPERS.register_module(module=DataParallel)
MODULE_WRAPPERS.register_module(module=DistributedDataParallel)


def is_module_wrapper(module: object) -> bool:
    """Whether ``module`` is of a class registered in MODULE_WRAPPERS, or in a child of it."""

    def known(registry: Registry) -> bool:
        kinds: Any = tuple(registry.module_dict.values())
        return isinstance(module, kinds) or any(known(child) for child in registry.children.values())

    return known(MODULE_WRAPPERS)


def unwrap(module: Any) -> nn.Module:
    """The module inside all wrappers, or ``module`` itself."""
    while is_module_wrapper(module):
        module = module.module
    return module  # type: ignore[no-any-return]


class MMDataParallel(DataParallel[nn.Module]):
    """A module and the one device it runs on.

    Args:
        module: has ``train_step`` and ``val_step``, if they are to be called.
        device_ids: ``[number]`` of a GPU, to which the module is moved. None: the device that the module is on. An
            empty list, or ``[-1]``: the CPU.
        dim: dimension along which tensors would be split.
    Raises:
        ValueError: at a step: more than one device; several GPUs take one process each.
    """

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None, output_device: Any = None, dim: int = 0):
        if device_ids is None:
            first = next(module.parameters(), None)
            device_ids = [first.device.index] if first is not None and first.is_cuda else []
        if not torch.cuda.is_available() or list(device_ids) in ([], [CPU]):
            nn.Module.__init__(self)  # DataParallel itself refuses to have no device where there are GPUs
            self.module, self.device_ids = module, []
        else:
            super().__init__(module, device_ids, output_device, dim)
        self.dim = dim

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if len(self.device_ids) > 1:
            return super().forward(*inputs, **kwargs)  # torch's replicas, with our scatter
        args, named = self._on_device(inputs, kwargs)
        return self.module(*args, **named)

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        return scatter_kwargs(inputs, kwargs, device_ids, dim=self.dim)

    def train_step(self, *inputs: Any, **kwargs: Any) -> Any:
        args, named = self._on_device(inputs, kwargs)
        inner: Any = self.module
        return inner.train_step(*args, **named)

    def val_step(self, *inputs: Any, **kwargs: Any) -> Any:
        args, named = self._on_device(inputs, kwargs)
        inner: Any = self.module
        return inner.val_step(*args, **named)

    def _on_device(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(self.device_ids) > 1:
            raise ValueError(
                f"MMDataParallel trains on one device, got device_ids={self.device_ids}; "
                "for several GPUs start one process each (torchrun) and use MMDistributedDataParallel"
            )
        return _to_device(inputs, kwargs, self.device_ids, self.dim)


class MMDistributedDataParallel(DistributedDataParallel):
    """torch's DistributedDataParallel whose ``train_step`` and ``val_step`` do what its ``forward`` does: gradients are
    averaged during backward, buffers broadcast before it.

    Args: as DistributedDataParallel's. On the CPU (gloo) without ``device_ids``.
    """

    _method = "forward"

    def train_step(self, *inputs: Any, **kwargs: Any) -> Any:
        return self._through_forward("train_step", inputs, kwargs)

    def val_step(self, *inputs: Any, **kwargs: Any) -> Any:
        return self._through_forward("val_step", inputs, kwargs)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        args, named = _to_device(inputs, kwargs, self.device_ids or [], self.dim)
        return super().forward(*args, **named)  # type: ignore[no-untyped-call]

    def _through_forward(self, method: str, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DDP prepares and finishes a step in its ``forward``; only what it calls in between is ours."""
        self._method = method
        try:
            return self(*inputs, **kwargs)
        finally:
            self._method = "forward"

    def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        # torch's private name for the call in between. Should it change, train_step would silently call forward:
        # tests/model/test_parallel.py would fail.
        method, self._method = self._method, "forward"  # the module's train_step may come back through self
        if method == "forward":
            return super()._run_ddp_forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        with self._inside_ddp_forward():
            return getattr(self.module, method)(*inputs, **kwargs)


def _to_device(
    inputs: tuple[Any, ...], kwargs: dict[str, Any], device_ids: list[Any], dim: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, named = scatter_kwargs(inputs, kwargs, device_ids or [CPU], dim)
    return (args[0], named[0]) if args else ((), {})


for _wrapper in (MMDataParallel, MMDistributedDataParallel):
    MODULE_WRAPPERS.register_module(module=_wrapper)

__all__ = ["MMDataParallel", "MMDistributedDataParallel", "is_module_wrapper", "unwrap"]
