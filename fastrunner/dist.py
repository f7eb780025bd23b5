"""The process group as a runner sees it: joining it, rank, world_size, work for rank 0 only, averages over ranks.

Everything but ``init_dist`` works without a process group: then rank is 0, world_size is 1 and averages change nothing.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def init_dist(launcher: str, backend: str = "nccl", **kwargs: Any) -> None:
    """Join the process group that ``launcher`` describes in the environment, and take this process's GPU.

    Args:
        launcher: "pytorch" (torchrun), "slurm" (srun) or "mpi" (mpirun).
        backend: "nccl", or "gloo" for the CPU. nccl without a GPU becomes gloo, with a warning.
        **kwargs: for ``torch.distributed.init_process_group``; with slurm also ``port``.
    Raises:
        ValueError: another launcher.
        KeyError: the launcher's variables are not there.
    """
    launchers = {"pytorch": _join_pytorch, "slurm": _join_slurm, "mpi": _join_mpi}
    if launcher not in launchers:
        raise ValueError(f"Invalid launcher type: {launcher}; it is one of {', '.join(launchers)}")
    if mp.get_start_method(allow_none=True) is None:
        mp.set_start_method("spawn")  # a fork after CUDA has started cannot use it
    if backend == "nccl" and torch.cuda.device_count() == 0:
        warnings.warn("nccl needs GPUs and there are none: the process group uses gloo", stacklevel=2)
        backend = "gloo"
    launchers[launcher](backend, **kwargs)


def _join_pytorch(backend: str, **kwargs: Any) -> None:
    rank = int(_variable("RANK", "torchrun"))
    _take_gpu(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(backend=backend, **kwargs)


def _join_mpi(backend: str, **kwargs: Any) -> None:
    local_rank = int(_variable("OMPI_COMM_WORLD_LOCAL_RANK", "mpirun"))
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise KeyError("The environment variable MASTER_ADDR is not set: mpirun -x MASTER_ADDR=<host of rank 0> ...")
    os.environ["WORLD_SIZE"] = _variable("OMPI_COMM_WORLD_SIZE", "mpirun")
    os.environ["RANK"] = _variable("OMPI_COMM_WORLD_RANK", "mpirun")
    _take_gpu(local_rank)
    dist.init_process_group(backend=backend, **kwargs)


def _join_slurm(backend: str, port: int | None = None, **kwargs: Any) -> None:
    rank = int(_variable("SLURM_PROCID", "srun"))
    nodes = _variable("SLURM_NODELIST", "srun")
    first = subprocess.getoutput(f"scontrol show hostname {nodes} | head -n1")
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    elif "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_slurm_port())
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ["WORLD_SIZE"] = _variable("SLURM_NTASKS", "srun")
    gpus = max(torch.cuda.device_count(), 1)
    local_rank = int(os.environ.get("SLURM_LOCALID", rank % gpus))
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ["RANK"] = str(rank)
    _take_gpu(local_rank)
    dist.init_process_group(backend=backend, **kwargs)


def _slurm_port() -> int:
    """The same for all tasks of a job, on all its nodes, and another for the next job; 29500 where there is no job id.

    MMCV looks for a free port, which each process finds for itself.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        return 20000 + int(job) % 20000
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(("127.0.0.1", 29500)) == 0:
            raise RuntimeError("port 29500 is taken: give another, init_dist('slurm', port=...) or MASTER_PORT")
    return 29500


def _take_gpu(local_rank: int) -> None:
    """Several processes share a GPU where there are fewer GPUs than processes."""
    if count := torch.cuda.device_count():
        torch.cuda.set_device(local_rank % count)


def _variable(name: str, program: str) -> str:
    if name not in os.environ:
        raise KeyError(f"The environment variable {name} is not set: was this process started by {program}?")
    return os.environ[name]


def get_dist_info() -> tuple[int, int]:
    """``(rank, world_size)`` of the default process group; ``(0, 1)`` where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def master_only(func: Callable[P, R]) -> Callable[P, R | None]:
    """Let ``func`` run on rank 0 only; elsewhere the call returns None. The rank is looked up at each call."""

    @functools.wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return func(*args, **kwargs) if get_dist_info()[0] == 0 else None

    return wrapper


@torch.no_grad()
def allreduce_params(params: Iterable[Tensor], coalesce: bool = True, bucket_size_mb: int = -1) -> None:
    """Replace every tensor by its mean over all ranks, in place; nothing happens at world size 1.

    Integer tensors (BatchNorm's ``num_batches_tracked``) count the same steps on every rank and are left alone: a mean
    of counters has no meaning, and dividing them in place is an error on today's torch.

    Args:
        params: tensors of any shapes, in the same order on every rank.
        coalesce: send one flat buffer per dtype instead of one message per tensor.
        bucket_size_mb: upper bound of such a buffer in MiB; not positive means no bound.
    """
    _, world_size = get_dist_info()
    if world_size == 1:
        return
    tensors = [p.data for p in params if p.is_floating_point() or p.is_complex()]
    for bucket in _buckets(tensors, bucket_size_mb) if coalesce else ([t] for t in tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat.div_(world_size))
        offset = 0
        for tensor in bucket:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()


def allreduce_grads(params: Iterable[nn.Parameter], coalesce: bool = True, bucket_size_mb: int = -1) -> None:
    """:func:`allreduce_params` for the gradients of the parameters that have one."""
    allreduce_params([p.grad for p in params if p.requires_grad and p.grad is not None], coalesce, bucket_size_mb)


def _buckets(tensors: list[Tensor], bucket_size_mb: int) -> Iterable[list[Tensor]]:
    """Consecutive tensors of one dtype and device, split where a bucket would pass its size."""
    limit = bucket_size_mb * 2**20 if bucket_size_mb > 0 else None
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        bucket: list[Tensor] = []
        size_bytes = 0
        for tensor in group:
            nbytes = tensor.numel() * tensor.element_size()
            if bucket and limit is not None and size_bytes + nbytes > limit:
                yield bucket
                bucket, size_bytes = [], 0
            bucket.append(tensor)
            size_bytes += nbytes
        yield bucket
