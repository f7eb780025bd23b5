"""Loggers: ``base`` says when, each other module says where to."""

from .base import LoggerHook
from .packages import NOT_CARRIED
from .tensorboard import TensorboardLoggerHook
from .text import TextLoggerHook
from .wandb import WandbLoggerHook

__all__ = ["NOT_CARRIED", "LoggerHook", "TensorboardLoggerHook", "TextLoggerHook", "WandbLoggerHook"]
