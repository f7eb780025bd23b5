"""The runners."""

from .base import BaseRunner
from .build import DefaultRunnerConstructor, build_runner
from .epoch_based import EpochBasedRunner, Runner
from .iter_based import IterBasedRunner

__all__ = [
    "BaseRunner",
    "DefaultRunnerConstructor",
    "EpochBasedRunner",
    "IterBasedRunner",
    "Runner",
    "build_runner",
]
