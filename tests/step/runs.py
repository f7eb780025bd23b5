"""Runs of a family under a recipe, and graphs that are interpreted instead of compiled: seconds become milliseconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrunner import EMAHook, Hook, IterBasedRunner
from fastrunner.step import graph, torch_private


class LossHook(Hook):
    """Keeps what the log got; acts once, at the end, so that it is no reason to call it at every iteration."""

    def after_run(self, runner):
        self.losses = runner.log_buffer.val_history["loss"]
        self.norms = runner.log_buffer.val_history.get("grad_norm")


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs be run by torch, operation by operation, as they were traced."""

    def run(module: Any, args: Any) -> Any:
        return (lambda inputs: module(*inputs)), True

    monkeypatch.setattr(graph, "compile_graph", run)


def interpret_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what recipe compile captures."""

    def compiled(graph: Any, inputs: Any, options: Any, context: Any) -> Any:
        def run(args: Any) -> Any:
            with torch.no_grad():
                return graph(*args)

        return run

    monkeypatch.setattr(torch_private, "compile_half", compiled)


def make(family, recipe, iters=8, ema=None, seed=0, hooks=(), step=None, log_interval=None):
    """A runner for a family, and where its losses go."""
    torch.manual_seed(seed)
    model = family.model()
    optimizer = family.optimizer(model.parameters())
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=iters, step=step or recipe, work_dir="out")
    runner.register_training_hooks(
        dict(policy="step", step=[5], by_epoch=False, warmup="linear", warmup_iters=3),
        dict(grad_clip=None if family.clip is None else dict(max_norm=family.clip)),
        log_config=None if log_interval is None else dict(interval=log_interval, hooks=[dict(type="TextLoggerHook")]),
    )
    if ema is not None:
        runner.register_hook(EMAHook(momentum=0.1, interval=ema), priority=49)
    losses = LossHook()
    runner.register_hook(losses)
    for hook in hooks:
        runner.register_hook(hook)
    return runner, losses


def train(family, recipe, iters=8, batches=None, **options):
    runner, losses = make(family, recipe, iters, **options)
    runner.run([batches or [family.batch(number) for number in range(4)]], [("train", 1)])
    return runner, losses.losses


def graph_of(runner) -> graph.GraphStep:
    return runner.current_plan().graph


def state_of(runner) -> dict[str, torch.Tensor]:
    """All tensors of model and optimizer, by name, copied."""
    found = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    for name, param in runner.model.named_parameters():
        for key, value in runner.optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{name} {key}"] = value.clone()
    return found
