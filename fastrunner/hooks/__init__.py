"""Hooks: what happens around the iterations of a run."""

from .checkpoint import CheckpointHook
from .closure import ClosureHook
from .ema import EMAHook
from .hook import Hook
from .logger import LoggerHook, TextLoggerHook
from .lr import FixedLrUpdaterHook, LrUpdaterHook, StepLrUpdaterHook
from .optimizer import OptimizerHook
from .priority import Priority, get_priority
from .timer import IterTimerHook

__all__ = [
    "CheckpointHook",
    "ClosureHook",
    "EMAHook",
    "FixedLrUpdaterHook",
    "Hook",
    "IterTimerHook",
    "LoggerHook",
    "LrUpdaterHook",
    "OptimizerHook",
    "Priority",
    "StepLrUpdaterHook",
    "TextLoggerHook",
    "get_priority",
]
