"""The precision and layout that ``auto`` chooses, where it may: measured on steps that training does not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import StepConfig
from .eager import Stepping, move_channels_last
from .trial import Snapshot, iteration, result_of, sample, timed
from .verify import Result

ROUNDS = 3  # each way is timed that often, in turns, after one step that is looked at
# How far loss and gradients, as a whole, may be from the first way's: a guard against breakage, no bound of rounding.
# Who says "auto" has asked for another precision.
SANE = 0.25


@dataclass(frozen=True)
class Way:
    """A precision and a layout."""

    amp: str | None
    channels_last: bool

    def __str__(self) -> str:
        return (self.amp or "as it is") + (", channels last" if self.channels_last else "")


def ways(config: StepConfig, model: nn.Module) -> list[Way]:
    """What may be chosen from; the first is what runs as long as nothing is chosen."""
    amps: list[Any] = [None, "bf16"] if config.amp == "auto" else [config.amp]
    has_images = any(p.dim() == 4 for p in model.parameters())
    layouts: list[Any] = [config.channels_last] if config.channels_last != "auto" else [False, True][: 1 + has_images]
    return [Way(amp, layout) for layout in layouts for amp in amps]


def choose(
    ways: Sequence[Way], model: Any, bare: nn.Module, optimizer: Any, updater: Any, batch: Any, gain: float
) -> tuple[Way, list[str]]:
    """The fastest way that gives sane results, if it saves more than ``gain`` of an iteration; and what was seen.

    Args:
        ways: the first one is the measure.
        model: has the ``train_step``; ``bare`` is it without wrapper.
        updater: has ``zero_grad`` and ``step``.
    Cost: four steps a way, and a copy of parameters and state.
    """
    told: list[str] = []
    sides: dict[Way, Callable[[], float]] = {}
    with Snapshot(bare, optimizer) as before:
        wanted: Result | None = None
        for way in ways:
            call = Stepping(model, way.amp, way.channels_last, None).train_step
            arrange = partial(lay_out, bare, optimizer, way)
            try:
                result = result_of(call, bare, optimizer, batch, before, arrange)
            except Exception as error:  # an operation without bfloat16, say
                told.append(f"{way}: {type(error).__name__}: {str(error).strip()[:200]}")
                if wanted is None:
                    return way, told
                continue
            if wanted is not None and (why := _insane(result, wanted)):
                told.append(f"{way}: {why}")
                continue
            wanted = wanted or result
            sides[way] = partial(sample, partial(iteration, call, optimizer, updater, batch), before, arrange)
        seconds = timed(sides, ROUNDS)
    best = min(seconds, key=lambda way: seconds[way])
    told += [f"{way}: {each * 1e3:.3g} ms an iteration" for way, each in seconds.items()]
    return best if seconds[best] < (1 - gain) * seconds[ways[0]] else ways[0], told


def lay_out(model: nn.Module, optimizer: Any, way: Way) -> None:
    """Let parameters, and optimizer state of their shape, lie as the way says. Identities and values stay."""
    if not way.channels_last:
        return
    move_channels_last(model)
    for slot in optimizer.state.values():
        for value in slot.values():
            if isinstance(value, Tensor) and value.dim() == 4:
                value.data = value.data.contiguous(memory_format=torch.channels_last)


def _insane(ours: Result, wanted: Result) -> str:
    """What is wrong with a result; "" if nothing is."""
    distance = float((ours.loss - wanted.loss).abs() / wanted.loss.abs().clamp(min=1e-3))
    if not distance <= SANE:
        return f"the loss is another by {distance:.0%}"
    pairs = [(a, b) for a, b in zip(ours.grads.values(), wanted.grads.values(), strict=True) if b is not None]
    if not pairs or any(a is None for a, _ in pairs):
        return "some gradients are missing"
    apart = torch.stack([(a.double() - b.double()).norm() for a, b in pairs if a is not None]).norm()
    distance = float(apart / torch.stack([b.double().norm() for _, b in pairs]).norm().clamp(min=1e-30))
    return "" if distance <= SANE else f"the gradients are others by {distance:.0%}"
