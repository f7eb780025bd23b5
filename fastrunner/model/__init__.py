"""Models as a runner needs them: ``train_step`` and ``val_step``, wrappers, initial values, mixed precision."""

from .base_module import BaseModule, ModuleDict, ModuleList, Sequential
from .initializers import initialize
from .parallel import MMDataParallel, MMDistributedDataParallel, is_module_wrapper
from .precision import LossScaler, auto_fp16, force_fp32, wrap_fp16_model
from .supervised import supervised

__all__ = [
    "BaseModule",
    "LossScaler",
    "MMDataParallel",
    "MMDistributedDataParallel",
    "ModuleDict",
    "ModuleList",
    "Sequential",
    "auto_fp16",
    "force_fp32",
    "initialize",
    "is_module_wrapper",
    "supervised",
    "wrap_fp16_model",
]
