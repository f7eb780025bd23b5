"""Checkpoints: what is saved (``state``), the files (``file``), where they come from (``schemes``), models to and from
them (``sources``)."""

from .schemes import CheckpointLoader
from .sources import get_state_dict, load_checkpoint, load_state_dict, save_checkpoint, weights_to_cpu

__all__ = [
    "CheckpointLoader",
    "get_state_dict",
    "load_checkpoint",
    "load_state_dict",
    "save_checkpoint",
    "weights_to_cpu",
]
