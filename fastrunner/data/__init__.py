"""Data: the order of samples, the loaders, and one module a backend."""

from .builtin import Digits, Photos
from .container import DataContainer, collate, scatter
from .loader import IterLoader, build_dataloader

__all__ = ["DataContainer", "Digits", "IterLoader", "Photos", "build_dataloader", "collate", "scatter"]
