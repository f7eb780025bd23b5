"""Which kinds of batches have come, how often, and which of them are worth a graph. A checkpoint holds it.

A run that goes on from a checkpoint computes each iteration as the uninterrupted one did: by the graph, if there was
one for this kind of batch. Graph and recipe below differ in the last bits, so nothing less would be exact.
"""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

MAX_SHAPES = 256  # kinds of batches that are counted
MAX_SAMPLES = 8  # whose first batch is kept
RECURS = 3  # a kind that is not the first is compiled when it comes for the third time: a tail batch does not


class Batches:
    """Counts batches by ``guards.batch_key``.

    Attributes:
        resumed: kinds that a checkpoint brought. In this process nobody has looked what their step moves.
    """

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}
        self._seen: dict[str, int] = {}
        self._made: list[str] = []  # those with a graph
        self._samples: dict[Any, Any] = {}
        self.resumed: set[str] = set()

    def count(self, kind: Any, batch: Any) -> int:
        """One more batch of a kind; how many there were. The first one is copied. Cost: 20 us, and the copy."""
        name = self.name(kind)
        self._seen[name] = self._seen.get(name, 0) + 1
        if self._seen[name] == 1:
            self._samples[kind] = pytree.tree_map(_copied, batch)
            while len(self._samples) > MAX_SAMPLES:
                self._samples.pop(next(iter(self._samples)))
        return self._seen[name]

    def too_many(self) -> str:
        """Why no more are counted; empty while they are."""
        if len(self._seen) <= MAX_SHAPES:
            return ""
        return f"{MAX_SHAPES} kinds of batches came: other shapes, or values that are no tensors"

    def recurs(self, kind: Any) -> bool:
        """Whether it is time to make a graph for it."""
        name = self.name(kind)
        return self._seen[name] >= (RECURS if any(made != name for made in self._made) else 2)

    def sample(self, kind: Any) -> Any:
        """The first batch of a kind; None if it is not kept."""
        return self._samples.get(kind)

    def made(self, kind: Any) -> None:
        """There is a graph for this kind."""
        name = self.name(kind)
        if name not in self._made:
            self._made.append(name)

    def was_resumed(self, kind: Any) -> bool:
        """Whether there was a graph for this kind before the checkpoint that this run goes on from."""
        return self.name(kind) in self.resumed and self.name(kind) in self._made

    def again(self, kind: Any, seen: int = 0) -> None:
        """Let it count as having come ``seen`` times: it could not be compiled yet."""
        self._seen[self.name(kind)] = seen
        self.resumed.discard(self.name(kind))

    def name(self, kind: Any) -> str:
        """A kind as a text that is the same in another process."""
        if kind not in self._names:
            self._names[kind] = hashlib.sha256(repr(kind).encode()).hexdigest()[:16]
        return self._names[kind]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self._seen), "made": list(self._made)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._made = dict(state["seen"]), list(state["made"])
        self.resumed = set(self._seen)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
