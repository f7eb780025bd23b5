"""From a model to a checkpoint and back, with MMCV's keys and reports.

A file is ``dict(meta, state_dict[, optimizer][, resume])``; ``resume`` is ours, everything else is MMCV's.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..dist import get_dist_info
from ..log.setup import print_log
from ..model.parallel import is_module_wrapper, unwrap
from . import file
from .schemes import CheckpointLoader

Optimizers = Optimizer | dict[str, Optimizer]
REVISE_KEYS = ((r"^module\.", ""),)


def weights_to_cpu(state_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The same tensors on the CPU; ``_metadata`` (module versions) is kept."""
    # a module's extra state may be anything
    on_cpu = OrderedDict(
        (key, value.cpu() if isinstance(value, Tensor) else value) for key, value in state_dict.items()
    )
    on_cpu._metadata = getattr(state_dict, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return on_cpu


def get_state_dict(
    module: nn.Module, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
) -> OrderedDict[str, Tensor]:
    """``module.state_dict()`` without the ``module.`` of wrappers, at any depth.

    Args:
        destination: a dict to which the state is added; by default a new one.
        prefix: goes before all keys.
        keep_vars: keep the Parameters rather than detached tensors.
    """
    module = unwrap(module)
    state: Any = module.state_dict(keep_vars=keep_vars)
    for wrapper in _wrappers(module):
        state = _renamed(state, partial(re.sub, f"^{re.escape(wrapper)}\\.module\\.", f"{wrapper}."))
    if prefix:
        state = _renamed(state, lambda key: prefix + key)
    if destination is None:
        return state  # type: ignore[no-any-return]
    destination.update(state)
    return destination  # type: ignore[return-value]


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> OrderedDict[str, Any]:
    """The state with other keys; ``_metadata``, the versions of modules by their path, follows them."""
    renamed: Any = OrderedDict((rename(key), value) for key, value in state.items())
    versions: Any = getattr(state, "_metadata", {})
    moved = {rename(f"{path}.")[:-1]: version for path, version in versions.items() if path}
    renamed._metadata = OrderedDict({**versions, **moved})
    return renamed  # type: ignore[no-any-return]


def _wrappers(module: nn.Module) -> list[str]:
    """Paths of the wrappers inside ``module``, deepest first, so that renaming one leaves the others' paths true."""
    paths = [name for name, child in module.named_modules() if name and is_module_wrapper(child)]
    return sorted(paths, key=lambda path: -path.count("."))


def load_state_dict(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = False,
    logger: logging.Logger | None = None,
) -> None:
    """Copy ``state_dict`` into ``module``, looking through wrappers; tensors of another shape are reported, not loaded.

    Args:
        strict: raise where the keys or shapes do not match, instead of reporting it.
        logger: where the report goes, on rank 0; None prints it.
    Raises:
        RuntimeError: ``strict`` and something does not match, on every rank.
    """
    source: Any = OrderedDict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []

    # torch's own load_state_dict raises on other shapes even when not strict, and knows nothing of wrappers.
    def load(current: nn.Module, prefix: str = "") -> None:
        current = unwrap(current)
        local = {} if metadata is None else metadata.get(prefix[:-1], {})
        current._load_from_state_dict(source, prefix, local, True, missing, unexpected, errors)
        for name, child in current._modules.items():
            if child is not None:
                load(child, f"{prefix}{name}.")

    load(module)
    missing = [key for key in missing if "num_batches_tracked" not in key]  # files older than that buffer
    if unexpected:
        errors.append(f"unexpected key in source state_dict: {', '.join(unexpected)}\n")
    if missing:
        errors.append(f"missing keys in source state_dict: {', '.join(missing)}\n")
    if not errors:
        return
    report = "\n".join(["The model and loaded state dict do not match exactly\n", *errors])
    if strict:
        raise RuntimeError(report)
    if get_dist_info()[0] == 0:
        print_log(report, logger, logging.WARNING)


def revise(state_dict: Mapping[str, Any], revise_keys: Sequence[tuple[str, str]]) -> OrderedDict[str, Any]:
    """The state with each ``(pattern, replacement)`` applied to all keys by ``re.sub``, in order."""

    def rename(key: str) -> str:
        for pattern, replacement in revise_keys:
            key = re.sub(pattern, replacement, key)
        return key

    return _renamed(state_dict, rename)


def load_checkpoint(
    model: nn.Module,
    filename: str,
    map_location: Any = None,
    strict: bool = False,
    logger: logging.Logger | None = None,
    revise_keys: Sequence[tuple[str, str]] = REVISE_KEYS,
    *,
    trusted: bool = False,
) -> dict[str, Any]:
    """Load the weights of a checkpoint file into ``model`` and return the file's content as it is.

    Args:
        filename: a path or an address, see :mod:`fastrunner.checkpoint.schemes`.
        revise_keys: ``(regular expression, replacement)`` pairs for the keys.
        trusted: see :func:`fastrunner.checkpoint.file.read`.
    Raises:
        FileNotFoundError, RuntimeError: see :func:`fastrunner.checkpoint.file.read`, :func:`load_state_dict`.
    """
    checkpoint = CheckpointLoader.load_checkpoint(filename, map_location, logger, trusted=trusted)
    load_state_dict(model, revise(_weights(checkpoint, filename), revise_keys), strict, logger)
    return checkpoint  # type: ignore[no-any-return]


def _load_checkpoint(
    filename: str, map_location: Any = None, logger: logging.Logger | None = None, *, trusted: bool = False
) -> Any:
    """The content of a checkpoint file, from any scheme."""
    return CheckpointLoader.load_checkpoint(filename, map_location, logger, trusted=trusted)


def _load_checkpoint_with_prefix(
    prefix: str, filename: str, map_location: Any = None, *, trusted: bool = False
) -> OrderedDict[str, Any]:
    """The weights of a checkpoint file whose keys begin with ``prefix`` and a dot, without these.

    Raises:
        KeyError: no key begins so.
    """
    weights = _weights(_load_checkpoint(filename, map_location, trusted=trusted), filename)
    start = prefix if prefix.endswith(".") else f"{prefix}."
    found = OrderedDict((key[len(start) :], value) for key, value in weights.items() if key.startswith(start))
    if not found:
        tops = sorted({key.partition(".")[0] for key in weights})
        raise KeyError(f"{prefix} is not in {filename}: its keys begin with {tops}")
    return found


def _weights(checkpoint: Any, filename: str) -> Mapping[str, Any]:
    if not isinstance(checkpoint, dict):
        raise RuntimeError(f"No state_dict found in checkpoint file {filename}: it holds a {type(checkpoint).__name__}")
    return checkpoint.get("state_dict", checkpoint)  # type: ignore[no-any-return]


def save_checkpoint(
    model: nn.Module,
    filename: str,
    optimizer: Optimizers | None = None,
    meta: dict[str, Any] | None = None,
    file_client_args: dict[str, Any] | None = None,
    *,
    resume: dict[str, Any] | None = None,
) -> None:
    """Write weights, optimizer and meta to ``filename``, whole or not at all.

    ``meta`` gets ``fastrunner_version``, ``time`` and, where the model has them, ``CLASSES``.

    Raises:
        TypeError: ``meta`` is not a dict.
        ValueError: ``file_client_args`` asks for more than a local file.
    """
    if file_client_args is not None and file_client_args.get("backend") != "disk":
        raise ValueError(f"checkpoints are written to local files, file_client_args={file_client_args} asks for more")
    if meta is not None and not isinstance(meta, dict):
        raise TypeError(f"meta must be a dict or None, got {type(meta).__name__}")
    from .. import __version__

    meta = {} if meta is None else meta
    meta.update(fastrunner_version=__version__, time=time.asctime())
    classes = getattr(unwrap(model), "CLASSES", None)
    if classes is not None:
        meta["CLASSES"] = classes
    checkpoint: dict[str, Any] = {"meta": file.plain(meta), "state_dict": weights_to_cpu(get_state_dict(model))}
    if isinstance(optimizer, Optimizer):
        checkpoint["optimizer"] = file.plain(optimizer.state_dict(), "optimizer")
    elif isinstance(optimizer, dict):
        states = {name: each.state_dict() for name, each in optimizer.items()}
        checkpoint["optimizer"] = file.plain(states, "optimizer")
    if resume is not None:
        checkpoint["resume"] = file.plain(resume, "resume")
    file.write(checkpoint, filename)


def load_for_resume(
    model: nn.Module, filename: str, map_location: Any, prefixes: tuple[str, ...], logger: logging.Logger, trusted: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load the weights; returns the file's content, and its tensors with these prefixes.

    Raises:
        KeyError: the file has no counters to resume from; the model is as it was.
    """
    content = CheckpointLoader.load_checkpoint(filename, map_location, logger, trusted=trusted)
    weights = revise(_weights(content, filename), REVISE_KEYS)
    if not {"epoch", "iter"} <= content.get("meta", {}).keys():
        raise KeyError(f"{filename} has no epoch and iter in its meta; load_checkpoint loads weights only")
    known = get_state_dict(model)
    kept = {key: value for key, value in weights.items() if key.startswith(prefixes)}
    for key in kept.keys() - known.keys():
        del weights[key]
    load_state_dict(model, weights, logger=logger)
    return content, kept


def load_optimizer(optimizer: Optimizers | None, checkpoint: dict[str, Any]) -> None:
    """Give the optimizer, or each of a dict of them, its state from ``checkpoint``."""
    state = checkpoint["optimizer"]
    if isinstance(optimizer, Optimizer):
        optimizer.load_state_dict(state)
    elif isinstance(optimizer, dict):
        for name, each in optimizer.items():
            if name not in state:
                raise KeyError(f"the checkpoint has no state for optimizer {name!r}, only for {sorted(state)}")
            each.load_state_dict(state[name])
    else:
        raise TypeError(
            f"the checkpoint holds an optimizer's state, but the runner's optimizer is {type(optimizer).__name__}; "
            "give the runner one, or resume with resume_optimizer=False"
        )


__all__ = [
    "_load_checkpoint",
    "_load_checkpoint_with_prefix",
    "get_state_dict",
    "load_checkpoint",
    "load_state_dict",
    "save_checkpoint",
    "weights_to_cpu",
]
