"""Loggers: ``base`` says when, each other module says where to."""

from .base import LoggerHook
from .text import TextLoggerHook

__all__ = ["LoggerHook", "TextLoggerHook"]
