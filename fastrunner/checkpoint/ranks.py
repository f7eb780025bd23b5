"""What ranks other than 0 need for an exact resume: a file of each beside the checkpoint, which rank 0 writes.

    <folder>/iter_100.pth                 rank 0: everything
    <folder>/rng/iter_100.pth.rank1       rank 1: its own ``resume`` entry (random states, hook states); a few kB

Every rank writes by itself, so nothing waits for another rank, and each node may have a disk of its own.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from . import file, state


def rank_file(path: str, rank: int) -> str:
    """The file of ``rank`` beside the checkpoint ``path``."""
    folder, name = os.path.split(path)
    return os.path.join(folder, "rng", f"{name}.rank{rank}")


def save_rank(runner: Any, path: str) -> None:
    """Write this rank's file beside the checkpoint ``path``."""
    file.write(file.plain(state.capture(runner), "resume"), rank_file(path, runner.rank))


def own_entry(entry: dict[str, Any], checkpoint: str, rank: int) -> dict[str, Any]:
    """This rank's ``resume`` entry: ``entry``, rank 0's, with its own random and hook states where it has saved them.

    Warns where it has not: then ``rng`` is left out, and the rank goes on with the random state that it has. The states
    of rank 0 would make every rank draw the same.
    """
    if rank == 0:
        return entry
    path = rank_file(os.path.realpath(os.path.expanduser(checkpoint)), rank)
    own = file.read(path) if os.path.isfile(path) else None
    if own is not None and own["counters"] == entry["counters"]:
        return {**entry, "rng": own["rng"], "hooks": own["hooks"]}
    warnings.warn(
        f"rank {rank} has no random state of its own at {path}: it goes on with the one it has. CheckpointHook saves "
        "one if it is registered on every rank",
        stacklevel=4,
    )
    return {key: value for key, value in entry.items() if key != "rng"}
