"""The hook plan: which bound methods run at which stage, worked out once instead of at every event.

MMCV asks every hook for every stage at every iteration, and most answers are empty methods. Here each stage has a tuple
that holds only the hooks that act there; a stage nobody acts on is an empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any, NoReturn

from ..hooks.hook import GENERIC, Hook, overrides
from ..hooks.logger.base import LoggerHook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

    Call = Callable[[BaseRunner], Any]
    Calls = tuple[Call, ...]

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
    return _hides_a_method(type(hook), tuple(getattr(hook, "__dict__", ())))  # type: ignore[arg-type]  # a class


@lru_cache(maxsize=256)  # asked some thirty times a plan, and the epoch runner makes a plan at each epoch's start
def _hides_a_method(kind: type, attributes: tuple[str, ...]) -> bool:
    return any(callable(getattr(kind, name, None)) for name in attributes)


def is_ours(hook: Hook) -> bool:
    """Whether the hook is exactly one of this package, and so touches nothing but what its docstring says."""
    return _of_this_package(type(hook)) and not shadows(hook)


def is_logger(hook: Any) -> bool:
    """Whether it is one of this package's loggers, or a call of one: they look at the log, lr and counters only."""
    hook = getattr(hook, "__self__", hook)
    return isinstance(hook, LoggerHook) and is_ours(hook)


def _of_this_package(kind: type) -> bool:
    return kind.__module__.startswith("fastrunner.hooks.")


def says_when(hook: Hook) -> bool:
    """Whether the hook's ``due`` can be trusted: a user's own always, ours only where nobody has added to the class."""
    if shadows(hook):
        return False
    changed = False
    for kind in type(hook).__mro__:
        if "due" in vars(kind):
            return not (changed and _of_this_package(kind))
        changed |= not _of_this_package(kind) and any(not name.startswith("__") for name in vars(kind))
    return False


def bound(hook: Hook, stage: str) -> Call:
    """What to call for ``hook`` at ``stage``: the generic method itself, where the stage would only pass on to it."""
    own = stage in getattr(hook, "__dict__", ()) or getattr(type(hook), stage) is not getattr(Hook, stage)
    call: Call = getattr(hook, stage if own else GENERIC.get(stage, stage))
    # A plain function on the object may stand for several stages; each gets an identity, to be named by.
    return call if hasattr(call, "__self__") else partial(call)


class HookList(list):  # type: ignore[type-arg]
    """The registered hooks; tells when they change. Users read and write the list itself, as MMCV's."""

    def __init__(self, hooks: Iterable[Hook], changed: Callable[[], None]) -> None:
        super().__init__(hooks)
        self._changed = changed

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def following(hooks: list[Hook]) -> Iterator[Hook]:
    """The hooks one after the other, each once, from a list that may change meanwhile.

    A new one is met if it stands behind those that were. One that is taken out is not met, and, unlike in a loop over
    the list itself, does not make the next one be missed.
    """
    met: set[int] = set()
    place = 0
    while place < len(hooks):
        hook = hooks[place]
        if id(hook) not in met:
            met.add(id(hook))
            yield hook
        if place < len(hooks) and hooks[place] is hook:
            place += 1
        else:  # the list has changed: go on behind the last that was met
            place = 1 + max((i for i, each in enumerate(hooks) if id(each) in met), default=-1)


def _telling(name: str) -> Callable[..., Any]:
    change = getattr(list, name)

    @wraps(change)
    def method(self: HookList, *args: Any, **kwargs: Any) -> Any:
        try:
            return change(self, *args, **kwargs)
        finally:
            self._changed()

    return method


for _name in ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort", "__setitem__", "__delitem__", "__iadd__", "__imul__"):  # fmt: skip # noqa: E501
    setattr(HookList, _name, _telling(_name))


class HookPlan:
    """stage -> calls in priority order, one attribute a stage.

    Args:
        hooks: in the order they run; the live list.
        call_hook: send every stage through this function instead: a runner's own ``call_hook``, or MMCV's plain order.

    Attributes:
        stale: the hooks are others by now.
    """

    stale = False

    before_run: Calls
    before_epoch: Calls
    before_train_epoch: Calls
    before_train_iter: Calls
    after_train_iter: Calls
    after_train_epoch: Calls
    before_val_epoch: Calls
    before_val_iter: Calls
    after_val_iter: Calls
    after_val_epoch: Calls
    after_epoch: Calls
    after_run: Calls

    def __init__(self, hooks: Sequence[Hook], call_hook: Callable[[str], None] | None = None) -> None:
        self.hooks = list(hooks)
        self._live = hooks
        self._hook_of: dict[int, Hook] = {}  # id of a call -> its hook
        self._calls: dict[tuple[int, str], Call] = {}
        self._origin: dict[int, tuple[str, str]] = {}  # id of a call -> (hook, stage), read only when one raises
        for stage in STAGES:
            if call_hook is not None:
                setattr(self, stage, (partial(_call_hook, call_hook, stage),))
                continue
            acting = [hook for hook in hooks if acts(hook, stage)]
            for hook in acting:
                call = self._calls[id(hook), stage] = bound(hook, stage)
                self._origin[id(call)] = type(hook).__name__, stage
                self._hook_of[id(call)] = hook
            setattr(self, stage, tuple(self._calls[id(hook), stage] for hook in acting))

    def call_of(self, hook: Hook, stage: str) -> Call | None:
        """What a stage calls for one hook; None if the hook does not act there."""
        return self._calls.get((id(hook), stage))

    def fire(self, calls: Calls, runner: BaseRunner) -> None:
        """Run the calls of one stage; what one of them raises says which hook and which stage it came from."""
        call = None
        try:
            for call in calls:
                if self.stale and self.is_gone(call):
                    continue
                call(runner)
        except Exception as error:
            self.raise_named(call, error)

    def is_gone(self, call: Call) -> bool:
        """Whether the hook of a call was taken out of the list since the plan was made."""
        hook = self._hook_of.get(id(call))
        return hook is not None and not any(each is hook for each in self._live)

    def raise_named(self, call: Call | None, error: Exception) -> NoReturn:
        """Raise what ``call`` raised, with the names of its hook and stage."""
        if id(call) not in self._origin or isinstance(error, HookError):
            raise error  # named already: by call_hook, or by the plan of a run inside this one
        raise named(error, *self._origin[id(call)]) from error


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
