"""Which names stand under which of mmcv's import paths, and where fastrunner has them.

The paths and names are those of mmcv 1.7.2 that projects import: all of ``mmcv.runner`` and ``mmcv.parallel``, and what
a training script needs of ``mmcv``, ``mmcv.utils``, ``mmcv.cnn`` and ``mmcv.engine``.
"""

from __future__ import annotations

import fastrunner

_PUBLIC: dict[str, str] = vars(fastrunner)["_HOME"]

_LR = tuple(
    f"{policy}LrUpdaterHook"
    for policy in ("", "Fixed", "Step", "Exp", "Poly", "Inv", "CosineAnnealing", "FlatCosineAnnealing", "CosineRestart",
                   "Cyclic", "OneCycle", "LinearAnnealing")
)  # fmt: skip
_MOMENTUM = tuple(
    f"{policy}MomentumUpdaterHook"
    for policy in ("", "Step", "CosineAnnealing", "LinearAnnealing", "Cyclic", "OneCycle")
)
_OPTIMIZER = (
    "OptimizerHook",
    "GradientCumulativeOptimizerHook",
    "Fp16OptimizerHook",
    "GradientCumulativeFp16OptimizerHook",
)
_EVALUATION = ("EvalHook", "DistEvalHook")
_LOGGERS = ("LoggerHook", "TextLoggerHook", "TensorboardLoggerHook", "WandbLoggerHook")
#: MMCV's loggers that fastrunner does not carry: they can be imported, and say so when they are made.
NOT_CARRIED = tuple(f"{name}LoggerHook" for name in ("ClearML", "Dvclive", "Mlflow", "Neptune", "Pavi", "Segmind"))
_HOOKS = (
    "HOOKS", "Hook", "CheckpointHook", "ClosureHook", "DistSamplerSeedHook", "EMAHook", "EmptyCacheHook",
    "IterTimerHook", "ProfilerHook", "SyncBuffersHook", *_EVALUATION, *_LOGGERS, *NOT_CARRIED, *_LR,
    *_MOMENTUM, *_OPTIMIZER,
)  # fmt: skip
_CHECKPOINT = ("CheckpointLoader", "_load_checkpoint", "_load_checkpoint_with_prefix", "load_checkpoint",
               "load_state_dict", "save_checkpoint", "weights_to_cpu")  # fmt: skip
_LOADERS = tuple(f"load_from_{name}" for name in ("ceph", "http", "local", "mmcls", "openmmlab", "pavi", "torchvision"))
_DIST = ("allreduce_grads", "allreduce_params", "get_dist_info", "init_dist", "master_only")
_FP16 = ("LossScaler", "auto_fp16", "force_fp32", "wrap_fp16_model")
_MODULES = ("BaseModule", "ModuleDict", "ModuleList", "Sequential")
_OPTIM = (
    "DefaultOptimizerConstructor",
    "OPTIMIZERS",
    "OPTIMIZER_BUILDERS",
    "build_optimizer",
    "build_optimizer_constructor",
)
_RUN_UTILS = ("get_host_info", "get_time_str", "obj_from_dict", "set_random_seed")
_BUILDER = ("RUNNERS", "RUNNER_BUILDERS", "build_runner", "build_runner_constructor")
_TESTING = ("collect_results_cpu", "collect_results_gpu", "multi_gpu_test", "single_gpu_test")
_INIT_FUNCTIONS = (
    "bias_init_with_prob", "caffe2_xavier_init", "constant_init", "initialize", "kaiming_init", "normal_init",
    "trunc_normal_init", "uniform_init", "xavier_init",
)  # fmt: skip
_INITS = ("INITIALIZERS", "Caffe2XavierInit", "ConstantInit", "KaimingInit", "NormalInit", "PretrainedInit",
          "TruncNormalInit", "UniformInit", "XavierInit")  # fmt: skip
_CONFIG = ("Config", "ConfigDict", "DictAction")
_SMALL = (
    "ProgressBar", "check_file_exist", "digit_version", "has_method", "import_modules_from_strings", "is_list_of",
    "is_method_overridden", "is_seq_of", "is_str", "is_tuple_of", "mkdir_or_exist", "scandir", "symlink",
    "track_iter_progress",
)  # fmt: skip
_TORCH = ("TORCH_VERSION", "SyncBatchNorm", "_BatchNorm", "_ConvNd", "_InstanceNorm")

#: Paths that are always ours, whether mmcv is installed or not.
OURS: dict[str, tuple[str, ...]] = {
    "mmcv.runner": (
        *_HOOKS, *_CHECKPOINT, *_DIST, *_FP16, *_MODULES, *_OPTIM, *_RUN_UTILS, "BaseRunner", "EpochBasedRunner",
        "Runner", "IterBasedRunner", "IterLoader", "LogBuffer", "RUNNERS", "build_runner", "DefaultRunnerConstructor",
        "Priority", "get_priority",
    ),
    "mmcv.runner.base_module": _MODULES,
    "mmcv.runner.base_runner": ("BaseRunner",),
    "mmcv.runner.builder": _BUILDER,
    "mmcv.runner.checkpoint": (*_CHECKPOINT, "get_state_dict", *_LOADERS),
    "mmcv.runner.default_constructor": ("DefaultRunnerConstructor",),
    "mmcv.runner.dist_utils": _DIST,
    "mmcv.runner.epoch_based_runner": ("EpochBasedRunner", "Runner"),
    "mmcv.runner.fp16_utils": (
        *_FP16, "allreduce_grads", "cast_tensor_type", "patch_forward_method", "patch_norm_fp32"
    ),
    "mmcv.runner.hooks": _HOOKS,
    "mmcv.runner.hooks.checkpoint": ("HOOKS", "CheckpointHook"),
    "mmcv.runner.hooks.closure": ("HOOKS", "ClosureHook"),
    "mmcv.runner.hooks.ema": ("HOOKS", "EMAHook"),
    "mmcv.runner.hooks.evaluation": _EVALUATION,
    "mmcv.runner.hooks.hook": ("HOOKS", "Hook"),
    "mmcv.runner.hooks.iter_timer": ("HOOKS", "IterTimerHook"),
    "mmcv.runner.hooks.logger": (*_LOGGERS, *NOT_CARRIED),
    "mmcv.runner.hooks.logger.base": ("LoggerHook",),
    "mmcv.runner.hooks.logger.tensorboard": ("HOOKS", "TensorboardLoggerHook"),
    "mmcv.runner.hooks.logger.text": ("HOOKS", "TextLoggerHook"),
    "mmcv.runner.hooks.logger.wandb": ("HOOKS", "WandbLoggerHook"),
    "mmcv.runner.hooks.lr_updater": (
        "HOOKS", *_LR, "annealing_cos", "annealing_linear", "format_param", "get_position_from_periods"
    ),
    "mmcv.runner.hooks.memory": ("HOOKS", "EmptyCacheHook"),
    "mmcv.runner.hooks.momentum_updater": ("HOOKS", *_MOMENTUM),
    "mmcv.runner.hooks.optimizer": ("HOOKS", *_OPTIMIZER),
    "mmcv.runner.hooks.profiler": ("HOOKS", "ProfilerHook"),
    "mmcv.runner.hooks.sampler_seed": ("HOOKS", "DistSamplerSeedHook"),
    "mmcv.runner.hooks.sync_buffer": ("HOOKS", "SyncBuffersHook"),
    "mmcv.runner.iter_based_runner": ("IterBasedRunner", "IterLoader"),
    "mmcv.runner.log_buffer": ("LogBuffer",),
    "mmcv.runner.optimizer": _OPTIM,
    "mmcv.runner.optimizer.builder": (*_OPTIM[1:], "TORCH_OPTIMIZERS", "register_torch_optimizers"),
    "mmcv.runner.optimizer.default_constructor": _OPTIM[:3],
    "mmcv.runner.priority": ("Priority", "get_priority"),
    "mmcv.runner.utils": _RUN_UTILS,
    "mmcv.parallel": ("DataContainer", "MMDataParallel", "MMDistributedDataParallel", "MODULE_WRAPPERS", "collate",
                      "is_module_wrapper", "scatter", "scatter_kwargs"),
    "mmcv.parallel.collate": ("collate",),
    "mmcv.parallel.data_container": ("DataContainer",),
    "mmcv.parallel.data_parallel": ("MMDataParallel",),
    "mmcv.parallel.distributed": ("MMDistributedDataParallel",),
    "mmcv.parallel.registry": ("MODULE_WRAPPERS",),
    "mmcv.parallel.scatter_gather": ("scatter", "scatter_kwargs"),
    "mmcv.parallel.utils": ("is_module_wrapper",),
    "mmcv.engine": _TESTING,
    "mmcv.engine.test": _TESTING,
    # One table of initializers: BaseModule's is ours, so the functions and classes must be too.
    "mmcv.cnn.utils.weight_init": (*_INITS, *_INIT_FUNCTIONS, "BaseInit", "trunc_normal_", "update_init_info"),
}  # fmt: skip

#: Names that are replaced inside an installed mmcv, which keeps everything else of these modules.
REPLACED: dict[str, tuple[str, ...]] = {
    "mmcv": (*_CONFIG, "Registry", "build_from_cfg", "collect_env", "get_logger", "print_log"),
    "mmcv.utils": (*_CONFIG, "Registry", "build_from_cfg", "collect_env", "get_logger", "print_log"),
    "mmcv.utils.config": _CONFIG,
    "mmcv.utils.env": ("collect_env",),
    "mmcv.utils.logging": ("get_logger", "logger_initialized", "print_log"),
    "mmcv.utils.registry": ("Registry", "build_from_cfg"),
}

#: What stands in for mmcv where it is not installed, beside OURS and REPLACED.
STAND_INS: dict[str, tuple[str, ...]] = {
    "mmcv": (*REPLACED["mmcv"], *_SMALL, "dump", "load"),
    "mmcv.utils": (*REPLACED["mmcv.utils"], *_SMALL, *_TORCH),
    **{path: names for path, names in REPLACED.items() if path.count(".") == 2},
    "mmcv.utils.misc": _SMALL,
    "mmcv.utils.parrots_wrapper": _TORCH,
    "mmcv.utils.path": ("check_file_exist", "mkdir_or_exist", "scandir", "symlink"),
    "mmcv.utils.version_utils": ("digit_version",),
    "mmcv.cnn": ("MODELS", *_INITS, *_INIT_FUNCTIONS),
    "mmcv.cnn.builder": ("MODELS",),
    "mmcv.cnn.utils": (*_INITS, *_INIT_FUNCTIONS),
}

_MORE = {
    "checkpoint.schemes": _LOADERS,
    "checkpoint.sources": ("_load_checkpoint", "_load_checkpoint_with_prefix"),
    "config": ("import_modules_from_strings",),
    "data.container": ("scatter_kwargs",),
    "hooks.policy": ("format_param",),
    "log.setup": ("logger_initialized",),
    "model.initializers": (*_INITS[1:], *_INIT_FUNCTIONS, "BaseInit", "trunc_normal_", "update_init_info"),
    "model.precision": ("cast_tensor_type", "patch_forward_method", "patch_norm_fp32"),
    "optim.build": ("TORCH_OPTIMIZERS", "register_torch_optimizers"),
    "optim.schedule": ("annealing_cos", "annealing_linear", "get_position_from_periods"),
    "runner.build": ("build_runner_constructor",),
    "utils": (*(name for name in _SMALL if name != "import_modules_from_strings"), "dump", "load"),
}
_ELSEWHERE = {
    "TORCH_VERSION": "torch:__version__",
    "SyncBatchNorm": "torch.nn:SyncBatchNorm",
    "_BatchNorm": "torch.nn.modules.batchnorm:_BatchNorm",
    "_ConvNd": "torch.nn.modules.conv:_ConvNd",
    "_InstanceNorm": "torch.nn.modules.instancenorm:_InstanceNorm",
}

#: Name -> "module:attribute" for every name above; a registry stands for what it has under the name.
HOME: dict[str, str] = {
    **{name: f"fastrunner.{module}:{name}" for name, module in _PUBLIC.items()},
    **{name: f"fastrunner.{module}:{name}" for module, names in _MORE.items() for name in names},
    **dict.fromkeys(NOT_CARRIED, "fastrunner.registry:HOOKS"),
    **_ELSEWHERE,
}
