"""One train iteration, flat: the hooks that were lowered stand in it at their places, the others are called there.

In MMCV's order, which is that of priorities:

    lr and momentum policies | before | data_time | late | train_step | between | zero_grad, backward, clip, update, EMA
    | after | time | last

``before`` ... ``last`` are the hooks that are called in this iteration; mostly there are none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..hooks.optimizer import OptimizerHook, check_loss
from ..hooks.optimizer_cumulative import GradientCumulativeOptimizerHook, SteppingHook
from ..hooks.optimizer_fp16 import Fp16OptimizerHook
from ..optim.foldable import is_fused

if TYPE_CHECKING:
    from ..hooks.ema import EMAHook
    from ..hooks.policy import PolicyHook
    from ..hooks.timer import IterTimerHook
    from ..runner.base import BaseRunner
    from .dispatch import Call, Calls
    from .run_plan import RunPlan


class Places(NamedTuple):
    """The calls of an iteration, between what was lowered."""

    before: Calls = ()
    late: Calls = ()
    between: Calls = ()
    after: Calls = ()
    last: Calls = ()
    # from the optimizer hook on, with the lowered hooks among them: what is left to call when the plan turns out stale
    plain_rest: Calls = ()


@dataclass(frozen=True)
class Terms:
    """The hooks that the iteration stands in for; each None or empty where it is called instead."""

    policies: tuple[PolicyHook, ...] = ()
    timer: IterTimerHook | None = None
    optimizer_hook: OptimizerHook | None = None
    folds_clip: bool = False
    ema: EMAHook | None = None

    def is_whole(self, runner: BaseRunner) -> bool:
        """Whether timer, optimizer hook and what goes with it are all lowered."""
        hook, fused = self.optimizer_hook, is_fused(runner.step.updater)
        if type(hook) is not OptimizerHook or self.timer is None or runner.batch_processor is not None:
            return False
        clips = hook.grad_clip is None or self.folds_clip or holds_in_order(runner.step.updater, runner.model)
        return clips and (self.ema is None or fused)

    def refuse_graph(self, runner: BaseRunner) -> str | None:
        """Why an iteration of these terms cannot be one graph; None if it can, as far as hooks are concerned."""
        hook = self.optimizer_hook
        if runner.batch_processor is not None:
            return "a batch_processor does the step"
        if isinstance(runner.optimizer, dict):
            return "the model steps several optimizers itself"
        if hook is None:
            return "no optimizer hook is lowered: the model steps its optimizer itself, or see what was not lowered"
        if self.timer is None:
            return "the timer is not lowered"
        return None if hook.grad_clip is None or hook.clips_by_norm() else f"only an L2 norm is in graphs, not {hook.grad_clip}"  # fmt: skip # noqa: E501

    def for_graph(self, runner: BaseRunner) -> tuple[float | None, EMAHook | None, Any, Any]:
        """What a graph contains besides the model's step: what it clips to, the average, accumulation, loss scale."""
        hook = self.optimizer_hook
        clip = None if hook is None else hook.grad_clip
        adds_up = hook if isinstance(hook, GradientCumulativeOptimizerHook) else None
        scaler = hook if isinstance(hook, Fp16OptimizerHook) else None
        return None if clip is None else clip["max_norm"], self.ema, adds_up, scaler

    @property
    def hooks(self) -> list[Any]:
        return [*self.policies, *(h for h in (self.timer, self.optimizer_hook, self.ema) if h is not None)]


def make_iteration(plan: RunPlan, runner: BaseRunner, terms: Terms, places: Places, *, started: bool = False) -> Call:
    """The function that runs one iteration of ``runner.data_batch``.

    Args:
        started: the stage before the iteration is over; go on with train_step.
    """
    model, optimizer, timer = runner.stepping_model, runner.optimizer, terms.timer
    before, late, between, after, last, plain_rest = places
    by_model, waits, calls_after = runner.batch_processor is None, not started, bool(between or after or last)
    update, update_call = None, None
    if terms.optimizer_hook is not None:
        update = make_update(terms.optimizer_hook, runner.model, runner.step.updater, terms.folds_clip, terms.ema)
        update_call = plan.call_of(terms.optimizer_hook, "after_train_iter")

    def iteration(runner: BaseRunner) -> None:
        call, buffer = None, runner.log_buffer
        try:
            if waits:
                if runner._iter >= plan.next_write:
                    plan.write_policies(runner)
                if before:
                    for call in before:
                        if plan.stale and plan.is_gone(call):
                            continue
                        call(runner)
                    if plan.stale:
                        return plan.finish(runner, timer, late)
                if timer is not None:
                    buffer.append((1, {"data_time": time.perf_counter() - timer.t}))
                if late:
                    for call in late:
                        if plan.stale and plan.is_gone(call):
                            continue
                        call(runner)
                    if plan.stale:
                        return plan.finish(runner)
                call = None
            if by_model:
                runner.outputs = outputs = model.train_step(runner.data_batch, optimizer)
                if type(outputs) is not dict or "num_samples" not in outputs:
                    runner.check_outputs(outputs)
                if "log_vars" in outputs:
                    buffer.update(outputs["log_vars"], outputs["num_samples"])
            else:
                runner.run_iter(runner.data_batch, train_mode=True)
            if plan.stale:
                return plan.finish_step(runner)
            if calls_after:
                runner._uncounted = "iter"
                for call in between:
                    if plan.stale and plan.is_gone(call):
                        continue
                    call(runner)
                if plan.stale:
                    plan.fire(plain_rest, runner)
                    runner._uncounted = ""
                    return None
            if update is not None:
                call = update_call
                update(runner)
            if after:
                for call in after:
                    if plan.stale and plan.is_gone(call):
                        continue
                    call(runner)
            if timer is not None:
                now = time.perf_counter()
                buffer.append((1, {"time": now - timer.t}))
                timer.t = now
            if last:
                for call in last:
                    if plan.stale and plan.is_gone(call):
                        continue
                    call(runner)
            if calls_after:
                runner._uncounted = ""
        except Exception as error:
            if call is None:
                raise
            plan.raise_named(call, error)

    return iteration


def make_update(
    hook: OptimizerHook, model: Any, optimizer: Any, folds_clip: bool, ema: EMAHook | None
) -> Callable[[BaseRunner], None]:
    """What OptimizerHook does, and EMAHook where it follows directly."""
    basis, fused = hook.fold_basis(optimizer), is_fused(optimizer)
    clip, called = basis[0], isinstance(hook, SteppingHook)  # accumulation, a loss scale: in graphs only
    listed = clip is not None and holds_in_order(optimizer, model)  # a walk over the modules takes 10 us and more

    def update(runner: BaseRunner) -> None:
        if called or hook.fold_basis(optimizer) != basis:  # not what this was made for
            hook.after_train_iter(runner)
            if ema is not None:
                ema.after_train_iter(runner)
            return
        outputs = runner.outputs
        optimizer.zero_grad()
        try:
            outputs["loss"].backward()
        except (RuntimeError, AttributeError, KeyError):
            check_loss(outputs)  # says what is wrong with the loss, if it is the loss
            raise
        average = None if ema is None else ema.average_at(runner._iter)
        if clip is not None and folds_clip:
            optimizer.step(max_norm=clip["max_norm"], ema=average)
            runner.log_buffer.append((outputs["num_samples"], {"grad_norm": optimizer.grad_norm}))
            return
        if clip is not None:
            if listed and runner.model is model:
                grad_norm = hook.clip_grads([p for group in optimizer.param_groups for p in group["params"]])
            else:
                grad_norm = hook.clip_grads(runner.model.parameters())
            if grad_norm is not None:
                runner.log_buffer.update({"grad_norm": grad_norm}, outputs["num_samples"])
        if average is None:
            optimizer.step()
        elif fused:
            optimizer.step(ema=average)
        else:
            optimizer.step()
            average.update()

    return update


def holds_in_order(optimizer: Any, model: Any) -> bool:
    """Whether the optimizer's parameters are the model's, in the model's order: the norm of a list depends on it."""
    groups = getattr(optimizer, "param_groups", ())
    return [id(p) for group in groups for p in group["params"]] == [id(p) for p in model.parameters()]


def make_plain_iteration(plan: RunPlan, before: Calls, after: Calls) -> Call:
    """One iteration as MMCV runs it: hooks, ``run_iter``, hooks. What is lowered must equal this."""

    def iteration(runner: BaseRunner) -> None:
        plan.fire(before, runner)
        if plan.stale:  # hooks have come or gone: what follows is theirs already
            return plan.finish(runner)
        runner.run_iter(runner.data_batch, train_mode=True, **runner.run_kwargs)
        runner._uncounted = "iter"
        plan.fire(after, runner)
        runner._uncounted = ""
        return None

    return iteration
