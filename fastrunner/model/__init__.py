"""Models as a runner needs them: ``train_step`` and ``val_step``, with or without wrappers."""

from .parallel import is_module_wrapper
from .supervised import supervised

__all__ = ["is_module_wrapper", "supervised"]
