"""What a user says about the step: ``step=dict(recipe=..., modules=..., amp=..., channels_last=...)`` of a runner."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

RECIPES = ("eager", "fused", "compile", "graph", "aot", "cudagraph", "auto")
CAPTURED = ("fused", "compile", "graph")  # recipes whose iterations ``cudagraph`` may capture
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORCE = "FASTRUNNER_STEP"  # environment: a recipe that overrides the config's


@dataclass(frozen=True)
class StepConfig:
    """How the step is computed. Nothing here changes precision or layout unless it says so.

    Args:
        recipe: eager (MMCV's order, torch's own optimizer), fused (clip, update and average in one pass), compile
            (fused, with torch.compile on the model), graph (the whole iteration compiled), aot (the same as a
            library that runs without Python, compiled beside the training under graph), cudagraph (fused, captured
            by CUDA graphs where the device waits for the host), auto (fused, and graph where that turns out faster;
            compiled beside the training).
        modules: names of submodules for ``compile``; empty: the model.
        captures: what ``cudagraph`` captures: fused, compile, or graph (an iteration of that recipe).
        amp: autocast of ``train_step``: "bf16", "fp16" (without a loss scale), or None; "auto" (of recipe auto): none
            or bf16, whatever is faster.
        channels_last: whether convolutions' weights and 4-D inputs lie channels last; "auto": where that is faster.
    Raises:
        ValueError: a value that is not listed here.
        TypeError: a value of the wrong type.
    """

    recipe: str = "fused"
    modules: tuple[str, ...] = ()
    amp: str | None = None
    channels_last: bool | str = False
    captures: str = "fused"

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"step recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        if not isinstance(self.modules, tuple) or not all(isinstance(name, str) for name in self.modules):
            raise TypeError(f"step modules must be a list of names of submodules, got {self.modules!r}")
        if self.captures not in CAPTURED:
            raise ValueError(f"step captures must be one of {', '.join(CAPTURED)}, got {self.captures!r}")
        if self.captures != "fused" and self.recipe != "cudagraph":
            raise ValueError(f"step captures is what recipe 'cudagraph' captures; the recipe is {self.recipe!r}")
        if self.modules and "compile" not in (self.recipe, self.captures):
            raise ValueError(f"step modules are what recipe 'compile' compiles; the recipe is {self.recipe!r}")
        if self.amp not in (None, *AMP, "auto"):
            raise ValueError(f"step amp must be None, 'bf16', 'fp16' or 'auto', got {self.amp!r}")
        if self.channels_last not in (True, False, "auto"):
            raise ValueError(f"step channels_last must be True, False or 'auto', got {self.channels_last!r}")
        if "auto" in (self.amp, self.channels_last) and self.recipe != "auto":
            raise ValueError(f"amp and channels_last are chosen by recipe 'auto'; the recipe is {self.recipe!r}")


def make_config(step: StepConfig | Mapping[str, Any] | str | None, forced: str | None = None) -> StepConfig:
    """A runner's ``step`` argument as a StepConfig.

    Args:
        forced: a recipe instead of its own, by a command line; FASTRUNNER_STEP goes before both.
    Raises:
        TypeError: neither a dict nor a recipe's name, or an unknown key.
        ValueError: as StepConfig.
    """
    if isinstance(step, str):
        step = {"recipe": step}
    given: dict[str, Any] = {}
    if isinstance(step, StepConfig):
        given = {field.name: getattr(step, field.name) for field in fields(step)}
    elif isinstance(step, Mapping):
        given = dict(step)
    elif step is not None:
        raise TypeError(f"step must be a dict like dict(recipe='graph') or a recipe's name, got {step!r}")
    names = [field.name for field in fields(StepConfig)]
    if unknown := sorted(given.keys() - set(names)):
        raise TypeError(f"step has no {unknown[0]!r}; it has {', '.join(names)}")
    if forced := os.environ.get(FORCE) or forced:
        given["recipe"] = forced
        if forced != "compile":
            given.pop("modules", None)
        if forced != "cudagraph":
            given.pop("captures", None)
        if forced != "auto":
            given = {name: value for name, value in given.items() if value != "auto" or name == "recipe"}
    if isinstance(given.get("modules"), list):
        given["modules"] = tuple(given["modules"])
    return StepConfig(**given)
