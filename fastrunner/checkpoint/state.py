"""What a resume needs beyond weights, optimizer and meta: the ``resume`` entry of a checkpoint.

    resume = {version, counters: {epoch, iter}, workflow: {entries, flow, done},
              loaders: [{epoch, position, ...}, ...], rng: {python, numpy, torch[, cuda]}, hooks: {class: state}
              [, step: {...}]}

Counters count what is finished. MMCV's ``meta["iter"]`` is written while an iteration ends and before it is counted,
so there it may be one behind; these are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..data import rng

if TYPE_CHECKING:
    from ..runner.base import BaseRunner

VERSION = 1


def capture(runner: Any) -> dict[str, Any]:
    """The ``resume`` entry for a checkpoint written now. Reads the host (RNG states); a few kB."""
    step = runner.step.state_dict()
    return {
        "version": VERSION,
        "counters": {"epoch": runner.finished_epochs, "iter": runner.finished_iters},
        **runner.place(),
        "rng": rng_state(),
        "hooks": {key: hook.state_dict() for key, hook in stateful_hooks(runner).items()},
        **({"step": step} if step else {}),
    }


def restore(runner: Any, resume: dict[str, Any]) -> None:
    """Put counters, RNGs and hooks where they were; the runner keeps the rest for its ``run()``.

    Raises:
        ValueError: the entry was written by a newer version.
    """
    if resume["version"] > VERSION:
        raise ValueError(
            f"the checkpoint's resume entry has version {resume['version']}, this fastrunner reads up to {VERSION}; "
            "update fastrunner"
        )
    runner._epoch = resume["counters"]["epoch"]
    runner._iter = resume["counters"]["iter"]
    hooks = stateful_hooks(runner)
    for key, state in resume["hooks"].items():
        if key in hooks:
            hooks[key].load_state_dict(state)
        else:
            runner.logger.warning(f"the checkpoint holds the state of a hook that is not registered: {key}")
    if "step" in resume:
        runner.step.load_state_dict(resume["step"])
    if "rng" in resume:  # of this rank
        set_rng_state(resume["rng"])


def stateful_hooks(runner: BaseRunner) -> dict[str, Any]:
    """``"<class>"`` (``"<class>.<n>"`` for the n-th further one) -> hook, for hooks with ``state_dict``."""
    found: dict[str, Any] = {}
    for hook in runner.hooks:
        if callable(getattr(type(hook), "state_dict", None)):
            name = type(hook).__name__
            number = sum(key.partition(".")[0] == name for key in found)
            found[f"{name}.{number}" if number else name] = hook
    return found


def rng_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, as tensors and plain types."""
    state = rng.plain(rng.capture())
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()  # of the current device; other ranks have their own
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`rng_state`. A CUDA state is left out where there is no GPU."""
    rng.put_back(rng.from_plain(state))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
