"""Optimizers: built from configs, stepped in one fused pass; schedules as pure functions."""

from __future__ import annotations

from .fused import FusedSGD

__all__ = ["FusedSGD"]
