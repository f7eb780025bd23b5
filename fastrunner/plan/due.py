"""Which hooks a train iteration calls: those that say nothing about when they act, and those whose time has come."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..hooks.hook import NEVER, Hook
from .dispatch import acts, is_logger, is_ours, says_when

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


class DuePoints:
    """When the hooks of a train iteration that have ``due`` want to be called.

    Args:
        hooks: all registered hooks.
        lowered: those that the step stands in for; they are never called.
        own_loop: the runner's methods are ours: a user's ``run_iter`` may change what any hook looks at.
        previous: points that were named already; they stay until they come.

    Attributes:
        alone: no user's hook is called at every iteration: nothing changes but what the plan knows.
        always: hooks that are called at every iteration.
    """

    def __init__(
        self, hooks: Sequence[Hook], lowered: Collection[Hook], own_loop: bool, previous: DuePoints | None
    ) -> None:
        acting = [hook for hook in hooks if acts(hook, "before_train_iter") or acts(hook, "after_train_iter")]
        self.alone = own_loop and all(is_ours(hook) or says_when(hook) for hook in acting)
        # What users leave behind (an lr, an interval, a buffer that is ready) concerns some hooks at any time.
        gone = set(map(id, lowered))  # by identity: a user's hook may compare as it likes
        self._timed: list[Any] = []
        self.always: list[Hook] = []
        for hook in acting:
            if id(hook) not in gone:
                timed = says_when(hook) and (self.alone or not hook.due_if_alone)
                (self._timed if timed else self.always).append(hook)
        named = {} if previous is None else previous._due
        self._due: dict[int, int] = {id(hook): named[id(hook)] for hook in self._timed if id(hook) in named}

    def points(self) -> list[tuple[Hook, int | None]]:
        """The hooks with ``due``, and the iterations that they named; None: not asked yet."""
        return [(hook, self._due.get(id(hook))) for hook in self._timed]

    def somebody_acted(self) -> None:
        """A user's hook was called: the hooks that it may concern are called at the next iteration."""
        self._due |= {id(hook): 0 for hook in self._timed if hook.due_if_alone}

    def called(self, runner: BaseRunner) -> tuple[list[Hook], int]:
        """The hooks with ``due`` to call at the iteration at hand, and the next iteration to ask this again.

        Raises:
            TypeError: a hook's ``due`` did not return an int.
        """
        now, everybody = runner._iter, len(self._due) == len(self._timed)
        if everybody and (nearest := min(self._due.values(), default=NEVER)) > now:
            return [], nearest
        for hook in self._timed:
            if id(hook) not in self._due:
                self._due[id(hook)] = _ask(hook, runner)
        called = [hook for hook in self._timed if self._due[id(hook)] <= now]
        if not called:
            return [], min(self._due.values(), default=NEVER)
        for hook in called:
            del self._due[id(hook)]  # those that are called are asked again
        if not all(map(is_ours, called)):
            self.somebody_acted()
        # Loggers follow whoever made the buffer ready, so where one is called all are. They leave the others alone.
        ids, only_logs = set(map(id, called)), all(map(is_logger, called))
        follow = [hook for hook in self._timed if hook.due_if_alone and (not only_logs or is_logger(hook))]
        ids.update(map(id, follow))
        return [hook for hook in self._timed if id(hook) in ids], now + 1


def _ask(hook: Any, runner: BaseRunner) -> int:
    at = hook.due(runner)
    if not isinstance(at, int) or isinstance(at, bool):
        raise TypeError(
            f"{type(hook).__name__}.due must return the number of the next iteration to be called at, got {at!r}"
        )
    return at
