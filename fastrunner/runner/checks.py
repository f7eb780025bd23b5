"""What a runner refuses, and what it says: wrong types, wrong counts, workflows that would never end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from ..model.parallel import unwrap


def check_workflow(runner: object, workflow: Sequence[tuple[str, int]]) -> None:
    """Raise unless ``workflow`` is a list of ``(mode, count)``, with modes that the runner has."""
    if not isinstance(workflow, list) or not workflow:
        raise TypeError(f'workflow must be a list like [("train", 1)], got {workflow!r}')
    for entry in workflow:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise TypeError(f'a workflow entry must be a pair like ("train", 1), got {entry!r}')
        mode, count = entry
        if not isinstance(mode, str):
            raise TypeError(f"the mode of a workflow entry must be a str, got {type(mode).__name__}")
        if not callable(getattr(runner, mode, None)):
            raise ValueError(f'runner has no method named "{mode}" to run an epoch; known modes: "train", "val"')
        check_count(f"the count of workflow entry {tuple(entry)}", count)
    if all(mode != "train" for mode, _ in workflow):
        raise ValueError(f'workflow {workflow} has no "train" entry: such a run would never end')


def check_model(model: Any, batch_processor: Any) -> None:
    inner = unwrap(model)
    if batch_processor is None:
        if hasattr(model, "train_step"):
            return
        if inner is not model and hasattr(inner, "train_step"):
            raise TypeError(f"{type(model).__name__} hides the train_step of the {type(inner).__name__} that it wraps")
        raise TypeError(
            f"{type(model).__name__} has no train_step(data_batch, optimizer, **kwargs); wrap a plain module: "
            "fastrunner.supervised(model, loss_fn)"
        )
    if not callable(batch_processor):
        raise TypeError(f"batch_processor must be callable, got {type(batch_processor).__name__}")
    warnings.warn(
        "batch_processor is deprecated, please implement train_step() and val_step() in the model instead.",
        DeprecationWarning,
        stacklevel=4,
    )
    if hasattr(inner, "train_step") or hasattr(inner, "val_step"):
        raise RuntimeError("batch_processor and model.train_step()/model.val_step() cannot be both available.")


def check_optimizer(optimizer: Any) -> None:
    for name, each in optimizer.items() if isinstance(optimizer, dict) else [("", optimizer)]:
        if each is None and not isinstance(optimizer, dict):
            return
        if not isinstance(each, Optimizer):
            which = f"optimizer[{name!r}]" if name else "optimizer"
            raise TypeError(
                f"{which} must be a torch.optim.Optimizer, got {type(each).__name__}; "
                "build_optimizer makes one from a config"
            )


def check_count(name: str, count: Any) -> None:
    if count is None:
        return
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} must be an int, got {type(count).__name__}")
    if count <= 0:
        raise ValueError(f"{name} must be > 0, got {count}")
