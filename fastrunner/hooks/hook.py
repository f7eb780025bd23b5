"""The base of all hooks: ten stages, and the generic methods behind eight of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

NEVER = 1 << 62  # for ``due``: an iteration that no run reaches

# A specific stage calls its generic method unless it is overridden: before_train_epoch -> before_epoch, and so on.
GENERIC = {
    f"{when}_{mode}_{unit}": f"{when}_{unit}"
    for when in ("before", "after")
    for mode in ("train", "val")
    for unit in ("epoch", "iter")
}


class Hook:
    """Something that acts at stages of a run. Override the stages you want; each gets the runner and nothing else.

    A hook that acts rarely may say when: ``due(runner)`` returns the next iteration, the one at hand included, at
    which its ``before_train_iter`` and ``after_train_iter`` want to be called; it is not called before then, and is
    asked again after each call. Every hook without ``due`` is called at every iteration.

    A hook that should survive a resume implements ``state_dict()`` and ``load_state_dict(state)`` (plain types and
    tensors); one that keeps something in ``runner.meta`` may bring it up to date in ``write_meta(runner)``, which is
    called before a checkpoint is written; one that owns files or threads implements ``close()``, which is called once
    when a run ends, however it ends.
    """

    stages = (
        "before_run",
        "before_train_epoch",
        "before_train_iter",
        "after_train_iter",
        "after_train_epoch",
        "before_val_epoch",
        "before_val_iter",
        "after_val_iter",
        "after_val_epoch",
        "after_run",
    )

    priority: int  # set by register_hook; a class must not define it
    due_if_alone = False  # ``due`` holds only until a user's hook is called: it may change what this one looks at

    def before_run(self, runner: BaseRunner) -> None:
        pass

    def after_run(self, runner: BaseRunner) -> None:
        pass

    def before_epoch(self, runner: BaseRunner) -> None:
        pass

    def after_epoch(self, runner: BaseRunner) -> None:
        pass

    def before_iter(self, runner: BaseRunner) -> None:
        pass

    def after_iter(self, runner: BaseRunner) -> None:
        pass

    def before_train_epoch(self, runner: BaseRunner) -> None:
        self.before_epoch(runner)

    def before_val_epoch(self, runner: BaseRunner) -> None:
        self.before_epoch(runner)

    def after_train_epoch(self, runner: BaseRunner) -> None:
        self.after_epoch(runner)

    def after_val_epoch(self, runner: BaseRunner) -> None:
        self.after_epoch(runner)

    def before_train_iter(self, runner: BaseRunner) -> None:
        self.before_iter(runner)

    def before_val_iter(self, runner: BaseRunner) -> None:
        self.before_iter(runner)

    def after_train_iter(self, runner: BaseRunner) -> None:
        self.after_iter(runner)

    def after_val_iter(self, runner: BaseRunner) -> None:
        self.after_iter(runner)

    def every_n_epochs(self, runner: BaseRunner, n: int) -> bool:
        """Whether the epoch that is ending is a multiple of ``n``; never for ``n <= 0``."""
        return (runner.epoch + 1) % n == 0 if n > 0 else False

    def every_n_inner_iters(self, runner: BaseRunner, n: int) -> bool:
        """As ``every_n_iters``, counted within the epoch."""
        return (runner.inner_iter + 1) % n == 0 if n > 0 else False

    def every_n_iters(self, runner: BaseRunner, n: int) -> bool:
        """Whether the iteration that is ending is a multiple of ``n``; never for ``n <= 0``."""
        return (runner.iter + 1) % n == 0 if n > 0 else False

    def end_of_epoch(self, runner: BaseRunner) -> bool:
        return runner.inner_iter + 1 == len(runner.data_loader)

    def is_last_epoch(self, runner: BaseRunner) -> bool:
        return runner.epoch + 1 == runner._max_epochs

    def is_last_iter(self, runner: BaseRunner) -> bool:
        return runner.iter + 1 == runner._max_iters

    def get_triggered_stages(self) -> list[str]:
        """The stages that the hook's class overrides, themselves or through the generic method, in stage order."""
        return [stage for stage in Hook.stages if overrides(type(self), stage)]


def warn_of_no_epochs(
    hook: Any, runner: BaseRunner, consequence: str, acts: str = "acts at the ends of epochs"
) -> None:
    """Warn where a hook with ``by_epoch`` waits for epochs and the run is counted in iterations: none will come."""
    if hook.by_epoch and runner.max_epochs is None:
        warnings.warn(
            f"{type(hook).__name__} has by_epoch=True and {acts}, but this run is counted in iterations: "
            f"{consequence}. Say by_epoch=False.",
            stacklevel=3,
        )


def overrides(owner: Any, stage: str) -> bool:
    """Whether the class ``owner`` changes ``stage`` or the generic method behind it."""
    if getattr(owner, stage, None) is not getattr(Hook, stage):
        return True
    generic = GENERIC.get(stage)
    return generic is not None and getattr(owner, generic, None) is not getattr(Hook, generic)
