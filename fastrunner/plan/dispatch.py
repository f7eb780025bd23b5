"""The hook plan: which bound methods run at which stage, worked out once instead of at every event.

MMCV asks every hook for every stage at every iteration, and most answers are empty methods. Here each stage has a tuple
that holds only the hooks that act there; a stage nobody acts on is an empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..hooks.hook import GENERIC, Hook, overrides

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


class HookPlan:
    """stage -> calls in priority order, one attribute a stage.

    Attributes:
        hooks: the hooks the plan was made from; a plan whose list differs from the runner's is stale.
    """

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

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = list(hooks)
        self._origin: dict[int, tuple[str, str]] = {}  # id of a call -> (hook, stage), read only when one raises
        for stage in STAGES:
            acting = [hook for hook in hooks if acts(hook, stage)]
            calls = tuple(getattr(hook, stage) for hook in acting)
            setattr(self, stage, calls)
            self._origin.update(
                (id(call), (type(hook).__name__, stage)) for hook, call in zip(acting, calls, strict=True)
            )

    @classmethod
    def through(cls, hooks: Sequence[Hook], call_hook: Callable[[str], None]) -> HookPlan:
        """A plan that sends every stage through a runner's own ``call_hook``, for subclasses that override it."""
        plan = cls(())
        plan.hooks = list(hooks)
        for stage in STAGES:
            setattr(plan, stage, (partial(_call_hook, call_hook, stage),))
        return plan

    def fire(self, calls: tuple[Call, ...], runner: BaseRunner) -> None:
        """Run the calls of one stage; what one of them raises says which hook and which stage it came from."""
        for call in calls:
            try:
                call(runner)
            except Exception as error:
                if id(call) not in self._origin or isinstance(error, HookError):
                    raise  # named already: by call_hook, or by the plan of a run inside this one
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
    except TypeError:  # the original's type cannot be inherited from, or not be made from its own args
        result = HookError(message)
    result.hook, result.stage = hook, stage
    return result  # type: ignore[no-any-return]
