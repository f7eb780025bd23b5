"""fastrunner: a training runner for PyTorch with MMCV's words and a compiled core.

Importing this package starts nothing: each public name below is imported from its module when it is first used.
``__init__.pyi`` tells type checkers the same table.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "checkpoint": (
        "CheckpointLoader",
        "get_state_dict",
        "load_checkpoint",
        "load_state_dict",
        "save_checkpoint",
        "weights_to_cpu",
    ),
    "config": ("Config", "ConfigDict", "DictAction"),
    "data": (
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
    ),
    "dist": ("allreduce_grads", "allreduce_params", "get_dist_info", "init_dist", "master_only"),
    "engine": (
        "collect_results_cpu",
        "collect_results_gpu",
        "multi_gpu_test",
        "single_gpu_test",
    ),
    "environment": ("collect_env", "set_random_seed"),
    "hooks": (
        "Bf16OptimizerHook",
        "CheckpointHook",
        "ClosureHook",
        "CosineAnnealingLrUpdaterHook",
        "CosineAnnealingMomentumUpdaterHook",
        "CosineRestartLrUpdaterHook",
        "CyclicLrUpdaterHook",
        "CyclicMomentumUpdaterHook",
        "DistEvalHook",
        "DistSamplerSeedHook",
        "EMAHook",
        "EmptyCacheHook",
        "EvalHook",
        "ExpLrUpdaterHook",
        "FixedLrUpdaterHook",
        "FlatCosineAnnealingLrUpdaterHook",
        "Fp16OptimizerHook",
        "GradientCumulativeBf16OptimizerHook",
        "GradientCumulativeFp16OptimizerHook",
        "GradientCumulativeOptimizerHook",
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
    "model": (
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
    ),
    "optim": (
        "DefaultOptimizerConstructor",
        "EmaTerm",
        "FusedAdam",
        "FusedAdamW",
        "FusedSGD",
        "build_optimizer",
        "build_optimizer_constructor",
    ),
    "plan.dispatch": ("HookError",),
    "registry": (
        "DATASETS",
        "HOOKS",
        "INITIALIZERS",
        "MODELS",
        "MODULE_WRAPPERS",
        "OPERATIONS",
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
    "runner.utils": ("get_host_info", "get_time_str"),
    "step.config": ("StepConfig",),
    "step.parse_losses": ("parse_losses",),
    "utils": ("obj_from_dict",),
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
