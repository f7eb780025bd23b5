"""fastrunner: a training runner for PyTorch with MMCV's words and a compiled core.

Importing this package starts nothing: each public name below is imported from its module when it is first used.
``__init__.pyi`` tells type checkers the same table.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "checkpoint": ("get_state_dict", "load_checkpoint", "load_state_dict", "save_checkpoint", "weights_to_cpu"),
    "config": ("Config", "ConfigDict", "DictAction"),
    "data": ("Digits", "IterLoader", "Photos", "build_dataloader"),
    "dist": ("allreduce_grads", "allreduce_params", "get_dist_info", "master_only"),
    "hooks": (
        "CheckpointHook",
        "ClosureHook",
        "CosineAnnealingLrUpdaterHook",
        "CosineAnnealingMomentumUpdaterHook",
        "CosineRestartLrUpdaterHook",
        "CyclicLrUpdaterHook",
        "CyclicMomentumUpdaterHook",
        "DistSamplerSeedHook",
        "EMAHook",
        "EmptyCacheHook",
        "ExpLrUpdaterHook",
        "FixedLrUpdaterHook",
        "FlatCosineAnnealingLrUpdaterHook",
        "Hook",
        "InvLrUpdaterHook",
        "IterTimerHook",
        "LinearAnnealingLrUpdaterHook",
        "LinearAnnealingMomentumUpdaterHook",
        "LoggerHook",
        "LrUpdaterHook",
        "MomentumUpdaterHook",
        "OneCycleLrUpdaterHook",
        "OneCycleMomentumUpdaterHook",
        "OptimizerHook",
        "PolyLrUpdaterHook",
        "Priority",
        "ProfilerHook",
        "StepLrUpdaterHook",
        "StepMomentumUpdaterHook",
        "SyncBuffersHook",
        "TensorboardLoggerHook",
        "TextLoggerHook",
        "WandbLoggerHook",
        "get_priority",
    ),
    "log": ("LogBuffer", "get_logger", "print_log"),
    "model": ("is_module_wrapper", "supervised"),
    "optim": ("DefaultOptimizerConstructor", "EmaTerm", "FusedSGD", "build_optimizer"),
    "plan.dispatch": ("HookError",),
    "registry": (
        "DATASETS",
        "HOOKS",
        "MODELS",
        "MODULE_WRAPPERS",
        "OPTIMIZERS",
        "OPTIMIZER_BUILDERS",
        "RUNNERS",
        "RUNNER_BUILDERS",
        "Registry",
        "build_from_cfg",
    ),
    "runner": (
        "BaseRunner",
        "DefaultRunnerConstructor",
        "EpochBasedRunner",
        "IterBasedRunner",
        "Runner",
        "build_runner",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastrunner' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
