"""Checkpoints: what is saved (``state``), the files (``file``), models to and from them (``sources``)."""

from .sources import get_state_dict, load_checkpoint, load_state_dict, save_checkpoint, weights_to_cpu

__all__ = ["get_state_dict", "load_checkpoint", "load_state_dict", "save_checkpoint", "weights_to_cpu"]
