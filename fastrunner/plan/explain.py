"""The plan of a run as text: what became part of the iteration, what is called when, and why the rest was refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hooks.hook import NEVER, Hook
from ..hooks.optimizer_cumulative import SteppingHook
from ..hooks.priority import Priority
from .dispatch import STAGES

if TYPE_CHECKING:
    from ..runner.base import BaseRunner
    from .run_plan import RunPlan

_NAMES = {priority.value: priority.name for priority in Priority}


def explain(plan: RunPlan, runner: BaseRunner) -> str:
    """The plan as lines of at most 120 columns, but for what users' names and paths add."""
    blocks = [f"The plan of {type(runner).__name__} at iteration {runner.iter}:"]
    if plan.plain is not None:
        blocks.append(_block("Every hook is called as in MMCV, nothing is lowered, because", [plan.plain]))
    else:
        blocks.append(_block("Part of the iteration", _lowered(plan, runner)))
    blocks.append(_block("The step", runner.step.explain()))
    due, always = plan.called_hooks()
    blocks.append(_block("Called when due", [_row(h, _next(at)) for h, at in due]))
    blocks.append(_block("Called at every iteration", [_row(h, _why_always(h)) for h in always]))
    if plan.lowering is not None:
        blocks.append(_block("Not lowered", [_row(h, why) for h, why in plan.lowering.reasons]))
        if plan.lowering.clip is not None:
            blocks.append(_block("Clipping is an operation of its own, because", [plan.lowering.clip]))
    blocks.append(_block("At other stages", _other_stages(plan)))
    prefetch = "yes" if plan.no_prefetch is None else f"no: {plan.no_prefetch}"
    blocks.append(_block("Batches of the next epoch are made before this one ends", [prefetch]))
    blocks.append(_block("Several iterations in one call", [_bursts(plan, runner)]))
    blocks.append(_block("Log lines are written", ["off the loop's thread" if plan.alone else "at once"]))
    blocks.append(_block("Lines that read the host", runner.host_reads.report()))
    return "\n".join(block for block in blocks if block)


def _block(title: str, rows: list[str]) -> str:
    return "\n".join([f"  {title}:", *(f"    {row}" for row in rows)]) if rows else ""


def _row(hook: Hook, text: str) -> str:
    priority = _NAMES.get(hook.priority, str(hook.priority))
    return f"{type(hook).__name__:<28} {priority:<12} {text}"


def _lowered(plan: RunPlan, runner: BaseRunner) -> list[str]:
    terms = plan.terms
    rows = [_row(hook, "a write to the param groups when the value changes") for hook in terms.policies]
    if terms.timer is not None:
        rows.append(_row(terms.timer, "two readings of the clock"))
    hook = terms.optimizer_hook
    if isinstance(hook, SteppingHook):
        rows.append(_row(hook, "part of a graph, or called at its place"))
    elif hook is not None:
        clip = "" if hook.grad_clip is None else " clip and step in one pass" if terms.folds_clip else " clip, step"
        rows.append(_row(hook, f"zero_grad, backward,{clip or ' step'} ({type(runner.optimizer).__name__})"))
    if terms.ema is not None:
        rows.append(_row(terms.ema, "averages taken with the update"))
    rows.append(f"{'log_vars':<28} {'':<12} kept as they are, averaged when a log is due")
    return rows


def _next(at: int | None) -> str:
    return "not asked yet" if at is None else "never" if at >= NEVER else f"next at iteration {at}"


def _why_always(hook: Hook) -> str:
    return "it does not say when it is due" if not hasattr(hook, "due") else "users' hooks may change what it looks at"


def _other_stages(plan: RunPlan) -> list[str]:
    rows = []
    for stage in STAGES:
        if stage not in ("before_train_iter", "after_train_iter"):
            names = [type(hook).__name__ for hook in plan.hooks if plan.call_of(hook, stage) is not None]
            if names:
                rows.append(f"{stage:<18} {', '.join(names)}")
    return rows


def _bursts(plan: RunPlan, runner: BaseRunner) -> str:
    """Whether several iterations run without Python in between, and why not."""
    return f"no: {plan.why_single(runner)}" if plan.bursts is None else plan.bursts.explain()
