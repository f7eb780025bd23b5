"""Data: the order of samples, the loaders, and one module a backend."""

from .arrays import ArrayDataset
from .builtin import Digits, Photos
from .container import DataContainer, collate, scatter
from .loader import IterLoader, build_dataloader
from .operations import Operation

__all__ = [
    "ArrayDataset",
    "DataContainer",
    "Digits",
    "IterLoader",
    "Operation",
    "Photos",
    "build_dataloader",
    "collate",
    "scatter",
]
