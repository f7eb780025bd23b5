"""The iteration in which nobody is called: the step, two readings of the clock, and one row for the log.

It does what ``iteration.make_iteration`` does without calls, and is written out a second time because it is what most
iterations are: what only a called hook could see is left out.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..hooks.optimizer import check_loss
from .dispatch import HookPlan

if TYPE_CHECKING:
    from ..runner.base import BaseRunner
    from .dispatch import Call, Calls
    from .iteration import Terms
    from .run_plan import RunPlan


def make_quiet(plan: RunPlan, runner: BaseRunner, terms: Terms, *, writes: bool) -> Call:
    """One iteration of ``runner.data_batch``; timer, optimizer hook, its clip and the average are all lowered.

    It returns whether the hooks behind it were called, because the model has changed the run.

    Args:
        writes: lr or momentum may change in it.
    """
    model, optimizer, updater = runner.stepping_model, runner.optimizer, runner.step.updater
    hook, timer, ema = terms.optimizer_hook, terms.timer, terms.ema
    assert hook is not None
    assert timer is not None
    max_norm = None if hook.grad_clip is None or not terms.folds_clip else hook.grad_clip["max_norm"]
    clips_before = hook.grad_clip is not None and not terms.folds_clip
    update_call, clock = plan.call_of(hook, "after_train_iter"), time.perf_counter

    def quiet(runner: BaseRunner) -> bool:
        buffer, call, waited = runner.log_buffer, None, None
        outputs: Any = None
        try:
            if writes and runner._iter >= plan.next_write:
                plan.write_policies(runner)
            waited = clock() - timer.t
            runner.outputs = outputs = model.train_step(runner.data_batch, optimizer)
            if type(outputs) is not dict:
                runner.check_outputs(outputs)
            if "log_vars" in outputs:
                log_vars, count = outputs["log_vars"], outputs["num_samples"]
                kept = log_vars.copy() if len(log_vars) == buffer.plain_len else buffer.look_at(log_vars)
            else:
                kept, count = {}, outputs.get("num_samples")

            if plan.stale:  # the model has changed the run
                buffer.append((1, {"data_time": waited}))
                buffer.append((count, kept))
                waited = None
                plan.finish_step(runner)
                return True
            call = update_call
            updater.zero_grad()
            try:
                outputs["loss"].backward()
            except (RuntimeError, AttributeError, KeyError):
                check_loss(outputs)  # says what is wrong with the loss, if it is the loss
                raise
            average = None if ema is None else ema.average_at(runner._iter)
            if clips_before:  # the optimizer holds the model's parameters, in its order
                grad_norm = hook.clip_grads([p for group in updater.param_groups for p in group["params"]])
                if average is None:
                    updater.step()
                else:
                    updater.step(ema=average)
                now = clock()
                norms = () if grad_norm is None else (grad_norm,)
                buffer.append((count, kept, waited, now - timer.t, *norms))
            elif max_norm is not None:
                if average is None:
                    grad_norm = updater.clipped_step(max_norm)
                else:
                    updater.step(max_norm=max_norm, ema=average)
                    grad_norm = updater.grad_norm
                now = clock()
                buffer.append((count, kept, waited, now - timer.t, grad_norm))
            else:
                if average is None:
                    updater.step()
                else:
                    updater.step(ema=average)
                now = clock()
                buffer.append((count, kept, waited, now - timer.t))
            timer.t = now
            return False
        except Exception as error:
            if waited is not None:
                buffer.append((1, {"data_time": waited}))
            if call is None:
                if outputs is not None:
                    runner.check_outputs(outputs)  # log_vars without num_samples
                raise
            buffer.append((count, kept))
            plan.raise_named(call, error)

    return quiet


def then_call(plan: RunPlan, quiet: Call, last: Calls) -> Call:
    """A quiet iteration, and the hooks behind its timer: mostly a log that is due."""

    def iteration(runner: BaseRunner) -> None:
        if quiet(runner):
            return
        runner._uncounted = "iter"
        HookPlan.fire(plan, last, runner)
        runner._uncounted = ""

    return iteration
