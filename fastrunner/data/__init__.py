"""Data: the order of samples, the loaders, and one module a backend."""

from .builtin import Digits, Photos
from .loader import IterLoader, build_dataloader

__all__ = ["Digits", "IterLoader", "Photos", "build_dataloader"]
