"""The hook plan: which bound methods run at which stage, worked out once instead of at every event.

MMCV asks every hook for every stage at every iteration, and most answers are empty methods. Here each stage has a tuple
that holds only the hooks that act there; a stage nobody acts on is an empty tuple. A hook may also say at which
iteration it acts next (``due(runner)``): until the nearest such point all of them cost one comparison an iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..hooks.hook import GENERIC, NEVER, Hook, overrides
from ..hooks.timer import IterTimerHook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

    Call = Callable[[BaseRunner], Any]

# before_epoch and after_epoch are also fired as they are: once a run, by the iteration runner.
STAGES = (*Hook.stages, "before_epoch", "after_epoch")


class HookError(Exception):
    """A hook raised. The error that arrives is also an instance of the original's type; ``__cause__`` is the original.

    Attributes:
        hook: class name of the hook.
        stage: the stage that it was called at.
    """

    hook: str
    stage: str


def acts(hook: Hook, stage: str) -> bool:
    """Whether ``hook`` does anything at ``stage``: by its class, or by an attribute of the object itself.

    MMCV's specific stages call the generic ones, and ClosureHook, mocks and tests put callables on the instance.
    """
    shadowed = getattr(hook, "__dict__", ())
    return stage in shadowed or GENERIC.get(stage, stage) in shadowed or overrides(type(hook), stage)


def shadows(hook: Hook) -> bool:
    """Whether an attribute of the object hides a method of its class: a ClosureHook, a mock."""
    return any(callable(getattr(type(hook), name, None)) for name in getattr(hook, "__dict__", ()))


def is_ours(hook: Hook) -> bool:
    """Whether the hook is exactly one of this package, and so touches nothing but what its docstring says."""
    return _of_this_package(type(hook)) and not shadows(hook)


def _of_this_package(kind: type) -> bool:
    return kind.__module__.startswith("fastrunner.hooks.")


def says_when(hook: Hook) -> bool:
    """Whether the hook's ``due`` can be trusted: nothing that a subclass or the object adds comes before it."""
    if shadows(hook):
        return False
    for kind in type(hook).__mro__:
        if "due" in vars(kind):
            return True
        if not _of_this_package(kind) and any(not name.startswith("__") for name in vars(kind)):
            return False  # a subclass that changes when or what; it may define its own due
    return False


def bound(hook: Hook, stage: str) -> Call:
    """What to call for ``hook`` at ``stage``: the generic method itself, where the stage would only pass on to it."""
    own = stage in getattr(hook, "__dict__", ()) or getattr(type(hook), stage) is not getattr(Hook, stage)
    call: Call = getattr(hook, stage if own else GENERIC.get(stage, stage))
    # A plain function on the object may stand for several stages; each gets an identity, to be named by.
    return call if hasattr(call, "__self__") else partial(call)


class HookPlan:
    """stage -> calls in priority order, one attribute a stage.

    Attributes:
        hooks, model, optimizer: what the plan was made for; where the runner has others, it is stale.
        next_due: the first iteration at which a hook with ``due`` wants to be called, or may: until then the stages of
            a train iteration call only the hooks that say nothing.
        alone: until then, no user's hook is called: nothing changes but what the plan knows.
        quiet: the calls before and after a train iteration until then.
        timer: the IterTimerHook that the runner may stand in for until then: it needs no calls, only two readings of
            the clock. None where another hook could see the difference.
    """

    model: Any = None
    optimizer: Any = None
    before_run: tuple[Call, ...]
    before_epoch: tuple[Call, ...]
    before_train_epoch: tuple[Call, ...]
    before_train_iter: tuple[Call, ...]
    after_train_iter: tuple[Call, ...]
    after_train_epoch: tuple[Call, ...]
    before_val_epoch: tuple[Call, ...]
    before_val_iter: tuple[Call, ...]
    after_val_iter: tuple[Call, ...]
    after_val_epoch: tuple[Call, ...]
    after_epoch: tuple[Call, ...]
    after_run: tuple[Call, ...]

    def __init__(self, hooks: Sequence[Hook], previous: HookPlan | None = None) -> None:
        self.hooks = list(hooks)
        self._origin: dict[int, tuple[str, str]] = {}  # id of a call -> (hook, stage), read only when one raises
        for stage in STAGES:
            acting = [hook for hook in hooks if acts(hook, stage)]
            calls = tuple(bound(hook, stage) for hook in acting)
            setattr(self, stage, calls)
            self._origin.update(
                (id(call), (type(hook).__name__, stage)) for hook, call in zip(acting, calls, strict=True)
            )

        self._find_timed({} if previous is None else previous._due)

    def _find_timed(self, due: dict[int, int]) -> None:
        """Part the hooks of a train iteration into those that say when and those that are always called."""
        stages = ("before_train_iter", "after_train_iter")
        acting = [hook for hook in self.hooks if any(acts(hook, stage) for stage in stages)]
        # What users' hooks leave behind (an lr, an interval, a buffer that is ready) concerns some hooks at any time.
        self.alone = all(is_ours(hook) or says_when(hook) for hook in acting)
        self._timed = {id(hook): hook for hook in acting if says_when(hook) and (self.alone or not hook.due_if_alone)}
        self._due = {key: due[key] for key in self._timed if key in due}  # a point that was named stays, across plans
        timers = [hook for hook in acting if type(hook) is IterTimerHook and not shadows(hook)]
        self.timer = timers[0] if self.alone and len(timers) == 1 else None
        self._untimed = self._without(set(self._timed))
        self.quiet = self._without(set(self._timed) | {id(self.timer)})
        self.somebody_acted()

    def somebody_acted(self) -> None:
        """A user's hook was called: the hooks that it may concern are called at the next iteration."""
        self._due |= {key: 0 for key, hook in self._timed.items() if hook.due_if_alone}
        self.next_due = 0

    def _without(self, skipped: set[int]) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
        """The calls before and after a train iteration, but for those of some hooks (by id)."""
        return (
            tuple(call for call in self.before_train_iter if id(getattr(call, "__self__", None)) not in skipped),
            tuple(call for call in self.after_train_iter if id(getattr(call, "__self__", None)) not in skipped),
        )

    def train_iter_calls(self, runner: BaseRunner) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
        """The calls before and after the iteration at hand, in priority order.

        Raises:
            TypeError: a hook's ``due`` did not return an int.
        """
        now = runner._iter
        if now < self.next_due:
            return self._untimed
        for key, hook in self._timed.items():
            if key not in self._due:
                self._due[key] = _ask(hook, runner)
        waiting = {key for key, at in self._due.items() if at > now}
        if len(waiting) == len(self._timed):
            self.next_due = min(self._due.values(), default=NEVER)
            return self._untimed
        called = [hook for key, hook in self._timed.items() if key not in waiting]
        self._due = {key: self._due[key] for key in waiting}  # those that are called are asked again
        self.next_due = now + 1
        if not all(map(is_ours, called)):
            self.somebody_acted()
        # Loggers follow whoever made the buffer ready, so where one is called all are.
        return self._without({key for key in waiting if not self._timed[key].due_if_alone})

    @classmethod
    def through(cls, hooks: Sequence[Hook], call_hook: Callable[[str], None]) -> HookPlan:
        """A plan that sends every stage through a runner's own ``call_hook``, for subclasses that override it."""
        plan = cls(())
        plan.hooks = list(hooks)
        for stage in STAGES:
            setattr(plan, stage, (partial(_call_hook, call_hook, stage),))
        plan.quiet = plan._untimed = plan._without(set())
        plan.alone = False
        return plan

    def fire(self, calls: tuple[Call, ...], runner: BaseRunner) -> None:
        """Run the calls of one stage; what one of them raises says which hook and which stage it came from."""
        call = None
        try:
            for call in calls:
                call(runner)
        except Exception as error:
            if id(call) not in self._origin or isinstance(error, HookError):
                raise  # named already: by call_hook, or by the plan of a run inside this one
            raise named(error, *self._origin[id(call)]) from error


def _ask(hook: Any, runner: BaseRunner) -> int:
    at = hook.due(runner)
    if not isinstance(at, int):
        raise TypeError(
            f"{type(hook).__name__}.due must return the number of the next iteration to be called at, got {at!r}"
        )
    return at


def _call_hook(call_hook: Callable[[str], None], stage: str, runner: BaseRunner) -> None:
    call_hook(stage)


def named(error: Exception, hook: str, stage: str) -> Exception:
    """``error`` as a HookError that still is what it was, so that ``except ValueError`` keeps working."""
    message = f"{hook}.{stage} raised {type(error).__name__}: {error}"
    kind = type(error)
    try:
        both = type(kind.__name__, (HookError, kind), {"__module__": kind.__module__, "__str__": lambda self: message})
        result: Any = both.__new__(both, *error.args)
        result.args = error.args
        result.__dict__.update(error.__dict__)
        for name in ("filename", "filename2"):  # an OSError keeps these beside its args
            if getattr(error, name, None) is not None:
                setattr(result, name, getattr(error, name))
    except TypeError:  # the original's type cannot be inherited from, or not be made from its own args
        result = HookError(message)
    result.hook, result.stage = hook, stage
    return result  # type: ignore[no-any-return]
