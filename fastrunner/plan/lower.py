"""What of a run can be lowered into the iteration, and why the rest cannot: one function a kind of hook, with its rule.

Lowering never changes what a user can observe. A rule returns None where that is certain, else its reason, which
``runner.explain()`` prints. A hook that is not lowered is called at its priority, as in MMCV.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..hooks.ema import EMAHook
from ..hooks.hook import Hook
from ..hooks.optimizer import OptimizerHook
from ..hooks.optimizer_cumulative import GradientCumulativeOptimizerHook
from ..hooks.optimizer_fp16 import (
    Bf16OptimizerHook,
    Fp16OptimizerHook,
    GradientCumulativeBf16OptimizerHook,
    GradientCumulativeFp16OptimizerHook,
)
from ..hooks.policy import PolicyHook
from ..hooks.timer import IterTimerHook
from .dispatch import acts, is_ours, says_when, shadows
from .iteration import Terms

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

# Kinds of OptimizerHook that graphs know.
STEPPING = (
    Fp16OptimizerHook,
    Bf16OptimizerHook,
    GradientCumulativeOptimizerHook,
    GradientCumulativeFp16OptimizerHook,
    GradientCumulativeBf16OptimizerHook,
)
OWN_METHODS = ("run_iter", "train", "val", "call_hook")


def why_plain(runner: BaseRunner) -> str | None:
    """Rule 1, of the runner: nothing is lowered where its own methods were replaced, or were asked not to be."""
    if asked_plain():
        return "FASTRUNNER_PLAN=off"
    for name in OWN_METHODS:
        if is_replaced(runner, name):
            return f"{type(runner).__name__} has its own {name}()"
    if runner.run_kwargs:
        return f"run() passes arguments on to train_step: {', '.join(sorted(runner.run_kwargs))}"
    return None


def asked_plain() -> bool:
    return os.environ.get("FASTRUNNER_PLAN") == "off"


def is_replaced(runner: BaseRunner, name: str) -> bool:
    """Whether a method of the runner is a user's: of a subclass, or put on the object."""
    owner = next(kind for kind in type(runner).__mro__ if name in vars(kind))
    return name in vars(runner) or not owner.__module__.startswith("fastrunner.runner.")


class Lowering:
    """The decision for each hook of a run.

    Attributes:
        terms: what was lowered.
        reasons: of each hook that could have been lowered and was not: (hook, why).
        clip: why clipping is not folded into the optimizer's pass; None if it is, or nothing is clipped.
    """

    def __init__(self, runner: BaseRunner, hooks: Sequence[Hook]) -> None:
        self.reasons: list[tuple[Hook, str]] = []
        before = [hook for hook in hooks if acts(hook, "before_train_iter")]
        after = [hook for hook in hooks if acts(hook, "after_train_iter")]
        policies, timer, optimizer_hook, ema = [], None, None, None
        for hook in hooks:
            if isinstance(hook, PolicyHook) and self._may(hook, refuse_policy(hook, before, after)):
                policies.append(hook)
            elif isinstance(hook, IterTimerHook) and self._may(hook, refuse_timer(hook, after)):
                timer = hook
            elif isinstance(hook, OptimizerHook) and self._may(hook, refuse_optimizer_hook(hook, runner, after)):
                optimizer_hook = hook
        for hook in hooks:
            if isinstance(hook, EMAHook) and self._may(hook, refuse_ema(hook, optimizer_hook, after)):
                ema = hook
        self.clip = refuse_clip(optimizer_hook, runner) if optimizer_hook is not None else None
        folds = optimizer_hook is not None and optimizer_hook.grad_clip is not None and self.clip is None
        self.terms = Terms(tuple(policies), timer, optimizer_hook, folds, ema)

    def _may(self, hook: Hook, why: str | None) -> bool:
        if why is not None:
            self.reasons.append((hook, why))
        return why is None


def refuse_type(hook: Hook, kind: type) -> str | None:
    """Rule 1, of a hook: exactly our type, and nothing that shadows a method of it."""
    if type(hook) is not kind:
        return f"a subclass of {kind.__name__}"
    return "an attribute of the object hides one of its methods" if shadows(hook) else None


def refuse_policy(hook: PolicyHook, before: Sequence[Hook], after: Sequence[Hook]) -> str | None:
    """An lr or momentum policy becomes a write before the iterations that change its value.

    Only while no user's code is called that may write there as well, and only where nothing runs before it.
    """
    if not is_ours(hook):
        return "not exactly one of fastrunner's policies"
    for other in before:
        if other is hook:
            break
        if not (isinstance(other, PolicyHook) and is_ours(other)):
            return f"{type(other).__name__} comes before it"
    noisy = next((other for other in (*before, *after) if not is_ours(other) and not says_when(other)), None)
    return None if noisy is None else f"{type(noisy).__name__} is called at every iteration and may write there too"


def refuse_timer(hook: IterTimerHook, after: Sequence[Hook]) -> str | None:
    """IterTimerHook becomes two readings of the clock at its place, behind the update."""
    if why := refuse_type(hook, IterTimerHook):
        return why
    if sum(isinstance(other, IterTimerHook) for other in after) > 1:
        return "there are several timers"
    behind = [
        type(other).__name__ for other in after[after.index(hook) :] if isinstance(other, (OptimizerHook, EMAHook))
    ]
    return f"{behind[0]} comes after it" if behind else None


def refuse_optimizer_hook(hook: OptimizerHook, runner: BaseRunner, after: Sequence[Hook]) -> str | None:
    """OptimizerHook becomes zero_grad, backward, clip and step at its place.

    Its kinds with accumulation or a loss scale become part of graphs; in other iterations they are called there.
    """
    kind = OptimizerHook
    if type(hook) in STEPPING and runner.step.takes_windows:
        kind = type(hook)
        if isinstance(runner.model, DistributedDataParallel):
            return "it tells DistributedDataParallel when to exchange gradients"
    if why := refuse_type(hook, kind):
        return why
    if not isinstance(runner.optimizer, Optimizer):
        return f"it drives one optimizer, the runner has {type(runner.optimizer).__name__}"
    if hook.detect_anomalous_params:
        return "detect_anomalous_params walks the graph"
    if sum(isinstance(other, OptimizerHook) for other in after) > 1:
        return "there are several optimizer hooks"
    return None


def refuse_clip(hook: OptimizerHook, runner: BaseRunner) -> str | None:
    """Rule 5: clipping is folded into the optimizer's own pass."""
    return None if hook.grad_clip is None else hook.refuse_fold(runner.model, runner.step.updater)


def refuse_ema(hook: EMAHook, optimizer_hook: OptimizerHook | None, after: Sequence[Hook]) -> str | None:
    """EMAHook becomes one more term of the update, where it follows the update directly.

    Ahead of the optimizer it averages weights that are not updated yet, which is another average. A hook that is
    called only now and then may stand between the two: in its iterations EMAHook is called.
    """
    if why := refuse_type(hook, EMAHook):
        return why
    if optimizer_hook is None:
        return "the optimizer's hook is not lowered"
    if sum(isinstance(other, EMAHook) for other in after) > 1:
        return "there are several of them"
    if after.index(hook) < after.index(optimizer_hook):
        return "it comes before the optimizer's hook, and averages weights that are not updated yet"
    between = after[after.index(optimizer_hook) + 1 : after.index(hook)]
    called = next((other for other in between if not is_ours(other) and not says_when(other)), None)
    return None if called is None else f"{type(called).__name__} is called between the update and the average"


def refuse_prefetch(hooks: Sequence[Hook]) -> str | None:
    """Rule 7: batches of the next epoch are made before this one ends only if no hook can tell at an epoch's stages.

    The hooks of this package leave the data alone: DistSamplerSeedHook only says which epoch it is.
    """
    stages = ("before_train_epoch", "after_train_epoch", "before_epoch", "after_epoch")
    for hook in hooks:
        if not is_ours(hook) and any(acts(hook, stage) for stage in stages):
            return f"{type(hook).__name__} acts between epochs and may change the data"
    return None
