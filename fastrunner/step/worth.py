"""Which kinds of batches are worth a CUDA graph: those that recur, and in whose iterations the device waits.

With several ranks all of them have to capture the same iterations, or none: a collective in a replay waits for the same
one in the others' replays. So they vote, at iterations that all of them know, and only kinds on which all agree, after
the same kinds had come on all of them, are captured.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .batches import Batches
from .graph_backend import Cost
from .torch_private import Unfit

MEASURED = 3  # iterations of a kind whose cost is measured
GAIN = 0.05  # the device has to wait for the host for this share of an iteration
VOTES = frozenset(2**i for i in range(4, 14))  # calls after which ranks vote


class Next(Enum):
    """What an iteration without a graph is for."""

    BELOW = "the recipe below"
    LOOK = "the recipe below, watched for what it moves"
    MEASURE = "the recipe below, its cost measured"
    CAPTURE = "a step on the way to a graph"


@dataclass
class Kind:
    """One kind of batch."""

    costs: list[Cost] = field(default_factory=list)
    looked: bool = False
    ready: bool = False


class Worth:
    """The way of each kind of batch to its graph.

    Args:
        agree: asks all ranks whether they came with the same numbers; None: there is one rank.
    """

    def __init__(self, agree: Callable[[list[int]], bool] | None = None) -> None:
        self.batches = Batches()
        self.kinds: dict[Any, Kind] = {}
        self._agree = agree
        self._agreed: set[str] = set()
        self._history, self._calls = hashlib.sha256(), 0

    def vote(self, shape: Any, stays_off: bool) -> None:
        """To be called in each iteration where there are several ranks, whatever else happens in it.

        Args:
            shape: the batch's kind.
            stays_off: this rank will not capture it.
        """
        assert self._agree is not None
        name = self.batches.name(shape)
        self._history.update(name.encode())
        self._calls += 1
        if self._calls in VOTES and name not in self._agreed:
            kind = self.kinds.get(shape)
            ready = not stays_off and kind is not None and kind.ready
            if self._agree([int(ready), _number(self._history.hexdigest()), _number(name)]) and ready:
                self._agreed.add(name)

    def next(self, shape: Any, batch: Any) -> Next:
        """What the iteration at hand is, for a kind without a graph.

        Raises:
            Unfit: this kind is not worth one, or (passing) none is any more; why.
        """
        self.batches.count(shape, batch)
        if why := self.batches.too_many():
            raise Unfit(f"no shape repeats: {why}", passing=True)
        kind = self.kinds.setdefault(shape, Kind())
        if self.batches.was_resumed(shape):
            kind.ready = True  # a graph ran it before the checkpoint, and so it does from here on
        if not kind.ready:
            if not kind.looked:
                kind.looked = True
                return Next.LOOK
            if not self.batches.recurs(shape):
                return Next.BELOW
            if len(kind.costs) < MEASURED:
                return Next.MEASURE
            if statistics.median(cost.launch_bound for cost in kind.costs) < GAIN:
                raise Unfit(f"it would not pay: {in_words(kind)}")
            kind.ready = True
        if self._agree is not None and self.batches.name(shape) not in self._agreed:
            return Next.BELOW
        return Next.CAPTURE

    def all_say(self, ok: bool) -> bool:
        """Whether all ranks, in the same iteration, say yes."""
        return ok if self._agree is None else self._agree([int(ok)]) and ok

    def explain(self) -> list[str]:
        return [in_words(kind) for kind in self.kinds.values() if kind.costs]


def in_words(kind: Kind) -> str:
    """What was measured."""
    host, device = (1e6 * statistics.median(cost[i] for cost in kind.costs) for i in range(2))
    waits = 100 * statistics.median(cost.launch_bound for cost in kind.costs)
    return f"launching takes {host:.0f} us, the device works for {device:.0f} us and waits {waits:.0f} % of the time"


def _number(name: str) -> int:
    return (
        int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 2
    )  # an int64 can hold it and its negative
