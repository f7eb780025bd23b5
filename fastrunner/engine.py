"""Running a model over a loader without training it: on one process, or shared by all ranks.

Results come in the order of the loader's samples. MMCV's users find these functions under ``mmcv.engine``.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.distributed as dist

from .dist import get_dist_info
from .model.parallel import unwrap

_GAP = object()  # where a rank has one result less than another


def single_gpu_test(model: Any, data_loader: Any) -> list[Any]:
    """The results of ``model`` for every sample of ``data_loader``, with the model left in eval mode.

    A model with ``test_step(data_batch)`` is asked by that; any other as in MMCV, ``model(return_loss=False, **data)``.
    Either returns one result a sample: a list, or a tensor with a row each.

    Raises:
        TypeError: a batch that is not a dict, for a model without ``test_step``.
    """
    model.eval()
    results: list[Any] = []
    with torch.no_grad():
        for data in _shown(data_loader):
            results.extend(_predict(model, data))
    return results


def multi_gpu_test(model: Any, data_loader: Any, tmpdir: str | None = None, gpu_collect: bool = False) -> Any:
    """:func:`single_gpu_test` of this rank's share; rank 0 gets the results of all ranks, others None.

    Args:
        data_loader: rank r has samples r, r + world_size, ... as a DistributedSampler gives them; what was padded is
            cut off, if the loader has a ``dataset``.
        tmpdir: a folder that all ranks see, for ``collect_results_cpu``; None: a temporary one of rank 0.
        gpu_collect: send the results through the process group instead of files.
    """
    results = single_gpu_test(model, data_loader)
    dataset = getattr(data_loader, "dataset", None)
    size = None if dataset is None else len(dataset)
    return collect_results_gpu(results, size) if gpu_collect else collect_results_cpu(results, size, tmpdir)


def collect_results_cpu(result_part: list[Any], size: int | None, tmpdir: str | None = None) -> list[Any] | None:
    """The results of all ranks on rank 0, through files in ``tmpdir``, which is removed; None on others.

    Args:
        size: number of samples; more are padding, and are cut off. None keeps all.
    """
    rank, world_size = get_dist_info()
    if world_size == 1:
        return result_part[:size]
    if tmpdir is None:
        shared = [tempfile.mkdtemp() if rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        tmpdir = shared[0]
    assert tmpdir is not None
    os.makedirs(tmpdir, exist_ok=True)
    with open(os.path.join(tmpdir, f"part_{rank}.pkl"), "wb") as file:
        pickle.dump(result_part, file)
    dist.barrier()
    parts = []
    for each in range(world_size if rank == 0 else 0):
        with open(os.path.join(tmpdir, f"part_{each}.pkl"), "rb") as file:
            parts.append(pickle.load(file))
    if rank == 0:
        shutil.rmtree(tmpdir)
    dist.barrier()  # or a fast rank's next results would be removed with these
    return _interleaved(parts, size) if rank == 0 else None


def collect_results_gpu(result_part: list[Any], size: int | None) -> list[Any] | None:
    """:func:`collect_results_cpu` through the process group, with any backend."""
    rank, world_size = get_dist_info()
    if world_size == 1:
        return result_part[:size]
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, result_part)
    return _interleaved(parts, size) if rank == 0 else None


def _interleaved(parts: list[list[Any]], size: int | None) -> list[Any]:
    """Result 0 of each rank, then result 1 of each, ...: the order in which samplers deal samples out."""
    dealt = chain.from_iterable(zip_longest(*parts, fillvalue=_GAP))
    return [result for result in dealt if result is not _GAP][:size]


def _predict(model: Any, data: Any) -> Iterable[Any]:
    step = getattr(model, "test_step", None) or getattr(unwrap(model), "test_step", None)
    if step is not None:
        return step(data)  # type: ignore[no-any-return]
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{type(unwrap(model)).__name__} has no test_step(data_batch), and a batch that is a {type(data).__name__} "
            "cannot be given as model(return_loss=False, **data); define test_step, or give EvalHook a test_fn"
        )
    return model(return_loss=False, **data)  # type: ignore[no-any-return]


def _shown(data_loader: Any) -> Iterator[Any]:
    """The batches, with a progress bar on rank 0 where somebody looks at a terminal."""
    if get_dist_info()[0] != 0 or not sys.stderr.isatty():
        return iter(data_loader)
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(data_loader, "evaluating", total=len(data_loader), console=console, transient=True))
