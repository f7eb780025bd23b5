"""What one row of a comparison is: ``runner``, ``runner:variant``, and ``+bf16``, ``+channels_last`` behind it.

Rows of one precision are compared with each other, and with no other ones: where the arithmetic is not the same, more
speed is not the same work done faster. A layout only changes in which order sums are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .runners import load, split_name

PRECISIONS = ("float32", "bf16")
OPTIONS = ("bf16", "channels_last")


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        name: the runner.
        variant: of it; one that is not named is the runner's first.
        precision: "float32", or "bf16": autocast around the forward pass.
        channels_last: whether the weights of convolutions lie so.
    """

    name: str
    variant: str
    precision: str = "float32"
    channels_last: bool = False

    @property
    def full(self) -> str:
        """As it is written: the shortest text that ``parse`` reads as this."""
        text = self.name if self.variant == load(self.name).VARIANTS[0] else f"{self.name}:{self.variant}"
        text += "" if self.precision == "float32" else f"+{self.precision}"
        return text + ("+channels_last" if self.channels_last else "")


def parse(text: str) -> Case:
    """A row by its name.

    Raises:
        ValueError: an unknown runner, variant or option; the message lists those that there are.
    """
    full, *options = text.split("+")
    name, variant = split_name(full)
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"{full} has no option {option!r}; choose from {', '.join(OPTIONS)}")
    return Case(name, variant, "bf16" if "bf16" in options else "float32", "channels_last" in options)


def expand(names: Sequence[str], suffix: str = "") -> list[str]:
    """Rows in order. fastrunner is always one; ``mmcv`` is as shipped and ``nosleep``.

    Args:
        suffix: options that every row has, e.g. ``"+bf16"``.
    Raises:
        ValueError: as ``parse``.
    """
    cases: list[Case] = []
    if not any(parse(name).name == "fastrunner" for name in names):
        names = ["fastrunner", *names]
    for name in names:
        case = parse(name + suffix)
        cases.append(case)
        if name.split("+")[0] == "mmcv":
            cases.append(Case("mmcv", "nosleep", case.precision, case.channels_last))
    return [case.full for case in dict.fromkeys(cases)]


def base_of(name: str, names: Sequence[str]) -> str | None:
    """The row that ``name`` is held against: the first of fastrunner's with the same precision, which may be itself."""
    precision = parse(name).precision
    ours = (other for other in names if parse(other).name == "fastrunner" and parse(other).precision == precision)
    return next(ours, None)
