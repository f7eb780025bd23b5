"""From a config to an optimizer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..registry import OPTIMIZER_BUILDERS, OPTIMIZERS, build_from_cfg
from .constructor import DefaultOptimizerConstructor


def register_torch_optimizers() -> list[str]:
    """Put every optimizer of ``torch.optim`` into OPTIMIZERS; their names."""
    names = []
    for name in dir(torch.optim):
        kind = getattr(torch.optim, name)
        if inspect.isclass(kind) and issubclass(kind, Optimizer):
            OPTIMIZERS.register_module(name=name, module=kind, force=True)
            names.append(name)
    return names


TORCH_OPTIMIZERS = register_torch_optimizers()


def build_optimizer_constructor(cfg: dict[str, Any]) -> Any:
    return build_from_cfg(cfg, OPTIMIZER_BUILDERS)


def build_optimizer(model: nn.Module, cfg: dict[str, Any]) -> Any:
    """``dict(type="SGD", lr=0.1, momentum=0.9)`` and a model as an optimizer.

    Args:
        model: wrappers are looked through.
        cfg: ``type`` is any of torch.optim's names, or FusedSGD, or a registered one; ``constructor`` and
            ``paramwise_cfg`` choose how parameters become groups. Not changed.
    """
    if not isinstance(cfg, dict):
        raise TypeError(f"the optimizer's config must be a dict, got {type(cfg).__name__}")
    optimizer_cfg = copy.deepcopy(cfg)
    constructor = optimizer_cfg.pop("constructor", "DefaultOptimizerConstructor")
    paramwise_cfg = optimizer_cfg.pop("paramwise_cfg", None)
    build = build_optimizer_constructor(
        {"type": constructor, "optimizer_cfg": optimizer_cfg, "paramwise_cfg": paramwise_cfg}
    )
    return build(model)


__all__ = [
    "TORCH_OPTIMIZERS",
    "DefaultOptimizerConstructor",
    "build_optimizer",
    "build_optimizer_constructor",
    "register_torch_optimizers",
]
