"""Data: the order of samples, the loaders, and one module a backend."""

from .arrays import ArrayDataset
from .builtin import Digits, Photos
from .container import DataContainer, collate, scatter
from .dali import ClassificationEval, ClassificationTrain, DaliLoader, numba_augment, sample_input
from .images import ImageArray, ImageFolder, ImageList
from .loader import IterLoader, build_dataloader
from .operations import Operation

__all__ = [
    "ArrayDataset",
    "ClassificationEval",
    "ClassificationTrain",
    "DaliLoader",
    "DataContainer",
    "Digits",
    "ImageArray",
    "ImageFolder",
    "ImageList",
    "IterLoader",
    "Operation",
    "Photos",
    "build_dataloader",
    "collate",
    "numba_augment",
    "sample_input",
    "scatter",
]
