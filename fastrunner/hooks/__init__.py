"""Hooks: what happens around the iterations of a run."""

from .checkpoint import CheckpointHook
from .closure import ClosureHook
from .ema import EMAHook
from .empty_cache import EmptyCacheHook
from .evaluation import DistEvalHook, EvalHook
from .hook import Hook
from .logger import LoggerHook, TensorboardLoggerHook, TextLoggerHook, WandbLoggerHook
from .lr import (
    CosineAnnealingLrUpdaterHook,
    CosineRestartLrUpdaterHook,
    ExpLrUpdaterHook,
    FixedLrUpdaterHook,
    FlatCosineAnnealingLrUpdaterHook,
    InvLrUpdaterHook,
    LinearAnnealingLrUpdaterHook,
    LrUpdaterHook,
    PolyLrUpdaterHook,
    StepLrUpdaterHook,
)
from .lr_cyclic import CyclicLrUpdaterHook, OneCycleLrUpdaterHook
from .momentum import (
    CosineAnnealingMomentumUpdaterHook,
    CyclicMomentumUpdaterHook,
    LinearAnnealingMomentumUpdaterHook,
    MomentumUpdaterHook,
    OneCycleMomentumUpdaterHook,
    StepMomentumUpdaterHook,
)
from .optimizer import OptimizerHook
from .optimizer_cumulative import GradientCumulativeOptimizerHook
from .optimizer_fp16 import (
    Bf16OptimizerHook,
    Fp16OptimizerHook,
    GradientCumulativeBf16OptimizerHook,
    GradientCumulativeFp16OptimizerHook,
)
from .priority import Priority, get_priority
from .profiler import ProfilerHook
from .sampler import DistSamplerSeedHook
from .sync_buffers import SyncBuffersHook
from .timer import IterTimerHook

__all__ = [
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
]
