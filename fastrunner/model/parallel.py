"""Module wrappers: which modules only carry another one, and how to look through them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

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
