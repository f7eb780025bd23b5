"""What ``auto`` found out, kept on disk: a second run of the same model on the same machine does not measure again.

One small file of JSON a decision, named by a hash of everything that it depends on: source files and structure of the
model, optimizer, shapes of the batch, CPU and threads, versions of torch and fastrunner, and what may be chosen. A
decision that is out of date all the same costs speed, not correctness: what takes over is verified in every run.

A file that cannot be read or written is one warning. It is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.builtin import cache_dir
from .aot_cache import machine
from .config import AMP
from .guards import OF_TORCH

FORMAT = 1
RECIPES = ("fused", "compile", "graph")


@dataclass(frozen=True)
class Decision:
    """What to run from the start.

    Attributes:
        recipe: one of ``RECIPES``.
        amp, channels_last: as in StepConfig, without "auto".
        measured: what this was decided on, for people to read.
    """

    recipe: str
    amp: str | None = None
    channels_last: bool = False
    measured: tuple[str, ...] = ()


def key_of(model: nn.Module, optimizer: Any, batch: Any, choices: Any) -> str | None:
    """The name that a decision is kept under; None where the model's source cannot be read (typed in, say).

    Args:
        batch: its ``guards.batch_key``.
        choices: what may be chosen, and anything else it depends on; by its text.
    """
    told = hashlib.sha256()
    try:
        for part in (*_of_model(model), *_of_optimizer(optimizer), repr(batch), repr(choices), *_of_machine()):
            told.update(part.encode() + b"\0")
    except (OSError, TypeError):
        return None
    return told.hexdigest()[:32]


def folder() -> Path:
    """Where decisions are kept: ``steps`` in the cache folder (``FASTRUNNER_CACHE``)."""
    return cache_dir() / "steps"


def load(key: str, warn: Callable[[str], None]) -> Decision | None:
    """The decision of that name; None if there is none, or (with a warning) none that can be used."""
    path = folder() / f"{key}.json"
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT or found["key"] != key:
            raise ValueError("it is another program's, or another version's")
        decision = Decision(**{**found["decision"], "measured": tuple(map(str, found["decision"]["measured"]))})
        valid = decision.recipe in RECIPES and decision.amp in (None, *AMP) and decision.channels_last in (True, False)
        if not valid:
            raise ValueError("it says what is no decision")
        return decision
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"{path} cannot be used ({type(error).__name__}: {error}): auto measures again.")
        return None


def save(key: str, decision: Decision, warn: Callable[[str], None]) -> None:
    """Keep a decision; with a warning where that is not possible."""
    path = folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{key}")
        try:
            with open(descriptor, "w") as file:
                json.dump({"format": FORMAT, "key": key, "decision": asdict(decision)}, file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        warn(f"what auto found out cannot be kept in {path} ({error}): the next run measures again.")


def _of_model(model: nn.Module) -> Iterator[str]:
    """Structure, and the files that its classes were read from.

    Raises:
        OSError, TypeError: a class has no file.
    """
    yield repr(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device} {tensor.requires_grad}"
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if kind is not object}
    own = {kind for kind in kinds if not f"{kind.__module__}.".startswith(OF_TORCH)}
    for path in sorted({inspect.getfile(kind) for kind in own}):
        yield hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _of_optimizer(optimizer: Any) -> Iterator[str]:
    yield type(optimizer).__qualname__
    for group in optimizer.param_groups:
        yield f"{len(group['params'])} {sorted(name for name, value in group.items() if value)}"


def _of_machine() -> Iterator[str]:
    from .. import __version__

    yield f"{__version__} {torch.__version__} {machine()}"
    yield f"{torch.get_num_threads()} {os.cpu_count()}"
    if torch.cuda.is_available():
        yield torch.cuda.get_device_name()
