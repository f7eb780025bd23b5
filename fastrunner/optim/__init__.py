"""Optimizers: built from configs, stepped in one fused pass; schedules as pure functions."""

from __future__ import annotations

from .build import DefaultOptimizerConstructor, build_optimizer, build_optimizer_constructor
from .ema_term import EmaTerm
from .fused import FusedAdam, FusedAdamW, FusedSGD

__all__ = [
    "DefaultOptimizerConstructor",
    "EmaTerm",
    "FusedAdam",
    "FusedAdamW",
    "FusedSGD",
    "build_optimizer",
    "build_optimizer_constructor",
]
