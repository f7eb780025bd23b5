from .checkpoint import (
    CheckpointLoader as CheckpointLoader,
)
from .checkpoint import (
    get_state_dict as get_state_dict,
)
from .checkpoint import (
    load_checkpoint as load_checkpoint,
)
from .checkpoint import (
    load_state_dict as load_state_dict,
)
from .checkpoint import (
    save_checkpoint as save_checkpoint,
)
from .checkpoint import (
    weights_to_cpu as weights_to_cpu,
)
from .config import (
    Config as Config,
)
from .config import (
    ConfigDict as ConfigDict,
)
from .config import (
    DictAction as DictAction,
)
from .data import (
    ArrayDataset as ArrayDataset,
)
from .data import (
    ClassificationEval as ClassificationEval,
)
from .data import (
    ClassificationTrain as ClassificationTrain,
)
from .data import (
    DaliLoader as DaliLoader,
)
from .data import (
    DataContainer as DataContainer,
)
from .data import (
    Digits as Digits,
)
from .data import (
    ImageArray as ImageArray,
)
from .data import (
    ImageFolder as ImageFolder,
)
from .data import (
    ImageList as ImageList,
)
from .data import (
    IterLoader as IterLoader,
)
from .data import (
    Operation as Operation,
)
from .data import (
    Photos as Photos,
)
from .data import (
    build_dataloader as build_dataloader,
)
from .data import (
    collate as collate,
)
from .data import (
    numba_augment as numba_augment,
)
from .data import (
    sample_input as sample_input,
)
from .data import (
    scatter as scatter,
)
from .dist import (
    allreduce_grads as allreduce_grads,
)
from .dist import (
    allreduce_params as allreduce_params,
)
from .dist import (
    get_dist_info as get_dist_info,
)
from .dist import (
    init_dist as init_dist,
)
from .dist import (
    master_only as master_only,
)
from .engine import (
    collect_results_cpu as collect_results_cpu,
)
from .engine import (
    collect_results_gpu as collect_results_gpu,
)
from .engine import (
    multi_gpu_test as multi_gpu_test,
)
from .engine import (
    single_gpu_test as single_gpu_test,
)
from .environment import (
    collect_env as collect_env,
)
from .environment import (
    set_random_seed as set_random_seed,
)
from .hooks import (
    Bf16OptimizerHook as Bf16OptimizerHook,
)
from .hooks import (
    CheckpointHook as CheckpointHook,
)
from .hooks import (
    ClosureHook as ClosureHook,
)
from .hooks import (
    CosineAnnealingLrUpdaterHook as CosineAnnealingLrUpdaterHook,
)
from .hooks import (
    CosineAnnealingMomentumUpdaterHook as CosineAnnealingMomentumUpdaterHook,
)
from .hooks import (
    CosineRestartLrUpdaterHook as CosineRestartLrUpdaterHook,
)
from .hooks import (
    CyclicLrUpdaterHook as CyclicLrUpdaterHook,
)
from .hooks import (
    CyclicMomentumUpdaterHook as CyclicMomentumUpdaterHook,
)
from .hooks import (
    DistEvalHook as DistEvalHook,
)
from .hooks import (
    DistSamplerSeedHook as DistSamplerSeedHook,
)
from .hooks import (
    EMAHook as EMAHook,
)
from .hooks import (
    EmptyCacheHook as EmptyCacheHook,
)
from .hooks import (
    EvalHook as EvalHook,
)
from .hooks import (
    ExpLrUpdaterHook as ExpLrUpdaterHook,
)
from .hooks import (
    FixedLrUpdaterHook as FixedLrUpdaterHook,
)
from .hooks import (
    FlatCosineAnnealingLrUpdaterHook as FlatCosineAnnealingLrUpdaterHook,
)
from .hooks import (
    Fp16OptimizerHook as Fp16OptimizerHook,
)
from .hooks import (
    GradientCumulativeBf16OptimizerHook as GradientCumulativeBf16OptimizerHook,
)
from .hooks import (
    GradientCumulativeFp16OptimizerHook as GradientCumulativeFp16OptimizerHook,
)
from .hooks import (
    GradientCumulativeOptimizerHook as GradientCumulativeOptimizerHook,
)
from .hooks import (
    Hook as Hook,
)
from .hooks import (
    InvLrUpdaterHook as InvLrUpdaterHook,
)
from .hooks import (
    IterTimerHook as IterTimerHook,
)
from .hooks import (
    LinearAnnealingLrUpdaterHook as LinearAnnealingLrUpdaterHook,
)
from .hooks import (
    LinearAnnealingMomentumUpdaterHook as LinearAnnealingMomentumUpdaterHook,
)
from .hooks import (
    LoggerHook as LoggerHook,
)
from .hooks import (
    LrUpdaterHook as LrUpdaterHook,
)
from .hooks import (
    MomentumUpdaterHook as MomentumUpdaterHook,
)
from .hooks import (
    OneCycleLrUpdaterHook as OneCycleLrUpdaterHook,
)
from .hooks import (
    OneCycleMomentumUpdaterHook as OneCycleMomentumUpdaterHook,
)
from .hooks import (
    OptimizerHook as OptimizerHook,
)
from .hooks import (
    PolyLrUpdaterHook as PolyLrUpdaterHook,
)
from .hooks import (
    Priority as Priority,
)
from .hooks import (
    ProfilerHook as ProfilerHook,
)
from .hooks import (
    StepLrUpdaterHook as StepLrUpdaterHook,
)
from .hooks import (
    StepMomentumUpdaterHook as StepMomentumUpdaterHook,
)
from .hooks import (
    SyncBuffersHook as SyncBuffersHook,
)
from .hooks import (
    TensorboardLoggerHook as TensorboardLoggerHook,
)
from .hooks import (
    TextLoggerHook as TextLoggerHook,
)
from .hooks import (
    WandbLoggerHook as WandbLoggerHook,
)
from .hooks import (
    get_priority as get_priority,
)
from .log import (
    LogBuffer as LogBuffer,
)
from .log import (
    get_logger as get_logger,
)
from .log import (
    print_log as print_log,
)
from .model import (
    BaseModule as BaseModule,
)
from .model import (
    LossScaler as LossScaler,
)
from .model import (
    MMDataParallel as MMDataParallel,
)
from .model import (
    MMDistributedDataParallel as MMDistributedDataParallel,
)
from .model import (
    ModuleDict as ModuleDict,
)
from .model import (
    ModuleList as ModuleList,
)
from .model import (
    Sequential as Sequential,
)
from .model import (
    auto_fp16 as auto_fp16,
)
from .model import (
    force_fp32 as force_fp32,
)
from .model import (
    initialize as initialize,
)
from .model import (
    is_module_wrapper as is_module_wrapper,
)
from .model import (
    supervised as supervised,
)
from .model import (
    wrap_fp16_model as wrap_fp16_model,
)
from .optim import (
    DefaultOptimizerConstructor as DefaultOptimizerConstructor,
)
from .optim import (
    EmaTerm as EmaTerm,
)
from .optim import (
    FusedAdam as FusedAdam,
)
from .optim import (
    FusedAdamW as FusedAdamW,
)
from .optim import (
    FusedSGD as FusedSGD,
)
from .optim import (
    build_optimizer as build_optimizer,
)
from .optim import (
    build_optimizer_constructor as build_optimizer_constructor,
)
from .plan.dispatch import HookError as HookError
from .registry import (
    DATASETS as DATASETS,
)
from .registry import (
    HOOKS as HOOKS,
)
from .registry import (
    INITIALIZERS as INITIALIZERS,
)
from .registry import (
    MODELS as MODELS,
)
from .registry import (
    MODULE_WRAPPERS as MODULE_WRAPPERS,
)
from .registry import (
    OPERATIONS as OPERATIONS,
)
from .registry import (
    OPTIMIZER_BUILDERS as OPTIMIZER_BUILDERS,
)
from .registry import (
    OPTIMIZERS as OPTIMIZERS,
)
from .registry import (
    RUNNER_BUILDERS as RUNNER_BUILDERS,
)
from .registry import (
    RUNNERS as RUNNERS,
)
from .registry import (
    Registry as Registry,
)
from .registry import (
    build_from_cfg as build_from_cfg,
)
from .runner import (
    BaseRunner as BaseRunner,
)
from .runner import (
    DefaultRunnerConstructor as DefaultRunnerConstructor,
)
from .runner import (
    EpochBasedRunner as EpochBasedRunner,
)
from .runner import (
    IterBasedRunner as IterBasedRunner,
)
from .runner import (
    Runner as Runner,
)
from .runner import (
    build_runner as build_runner,
)
from .runner.utils import (
    get_host_info as get_host_info,
)
from .runner.utils import (
    get_time_str as get_time_str,
)
from .step.config import (
    StepConfig as StepConfig,
)
from .step.parse_losses import (
    parse_losses as parse_losses,
)
from .utils import obj_from_dict as obj_from_dict

__version__: str
