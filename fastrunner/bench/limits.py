"""What this machine can do at most, what a step needs at least, and what therefore stands in the way.

    arithmetic = FLOPs / rate of a large matrix product       memory = bytes of the update / bandwidth of a stream
    overhead = operations * time of one that does nothing     (forward and backward; torch's dispatch and autograd)
    limit = arithmetic + memory + empty loop                  share = limit / measured time of an iteration

The two do not overlap in an eager step: the update follows the backward pass. Activations are not counted, so the limit
is a lower bound. MFU (model FLOPs utilisation) = FLOPs / (time * rate), Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .report import duration

STREAM_BYTES = 64 << 20  # of each array: beyond all caches
SIDE = 768  # of the matrices
DTYPES = ("float32", "bfloat16")
REPEATS = 7  # the fastest counts: a limit is what is possible
# float32 elements read and written by clip and update: the norm reads g; then p, g and the state are read, p and the
# state written.
PASSES = {"SGD": {"plain": 4, "momentum": 6}, "Adam": {"plain": 8}, "AdamW": {"plain": 8}}
CHOICES = {
    "overhead": "a larger batch, or step=dict(recipe='graph'), which compiles the whole iteration",
    "arithmetic": "step=dict(amp='bf16') where the processor has it, channels_last=True for convolutions, more threads",
    "memory": "a larger batch, which has fewer updates a sample; FusedSGD and FusedAdamW read and write once",
    "data": "more workers_per_gpu, or a loader that decodes faster (DALI for JPEG, ArrayDataset in memory)",
    "hooks": "larger intervals, and a due() for hooks of your own that act rarely",
}
WHOLE = "a larger batch: the whole iteration is one compiled call already"


def measure_limits(device: torch.device, threads: int = 0) -> dict[str, Any]:
    """Bandwidth in B/s, rates in FLOP/s by dtype, seconds of an empty iteration. Half a second on two cores."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        return {
            "stream_bytes_per_s": stream(device),
            "flops_per_s": {name: matmul_rate(getattr(torch, name), device) for name in DTYPES},
            "empty_loop_s": empty_loop(),
            "operation_s": operation(device),
        }
    finally:
        torch.set_num_threads(before)


def stream(device: torch.device) -> float:
    """Bytes a second of ``b += a * x`` over arrays that no cache holds: two reads, one write. Source: McCalpin 1995,
    Memory Bandwidth and Machine Balance in Current High Performance Computers (STREAM)."""
    x, b = (torch.ones(STREAM_BYTES // 4, device=device) for _ in range(2))
    return 3 * STREAM_BYTES / _fastest(lambda: b.add_(x, alpha=0.5), device)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SIDE**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


def empty_loop(turns: int = 100_000) -> float:
    """Seconds of an iteration of a Python loop that does nothing."""
    items = [None] * turns
    best = float("inf")
    for _ in range(REPEATS):
        begin = perf_counter()
        for _item in items:
            pass
        best = min(best, (perf_counter() - begin) / turns)
    return best


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, those of the backward pass too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operation(device: torch.device) -> float:
    """Seconds of one operation on a handful of numbers, forward or backward: dispatch, autograd, nothing else."""
    x = torch.ones(4, device=device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(50):
            y = y * 0.5
        y.sum().backward()  # type: ignore[no-untyped-call]

    with _Operations() as counted:  # type: ignore[no-untyped-call]
        chain()
    return _fastest(chain, device) / int(counted.count)


def _fastest(work: Any, device: torch.device) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - begin)
    return best


def needs(model: nn.Module, batch: Any, optimizer: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs of forward and backward for one batch, bytes of clip and update, parameters. Gradients are dropped."""
    counter = FlopCounterMode(display=False)
    with counter, _Operations() as operations:  # type: ignore[no-untyped-call]
        model.train_step(batch, None)["loss"].backward()  # type: ignore[operator]
    params = [p for p in model.parameters() if p.grad is not None]
    for p in params:
        p.grad = None
    kind = PASSES.get(optimizer["type"].removeprefix("Fused"), {"plain": 4})
    passes = kind["momentum"] if optimizer.get("momentum") and "momentum" in kind else kind["plain"]
    return {
        "flops": float(counter.get_total_flops()),
        "operations": float(operations.count),
        "update_bytes": float(sum(passes * p.numel() * p.element_size() for p in params)),
        "num_parameters": float(sum(p.numel() for p in params)),
    }


def quantity(value: float, unit: str) -> str:
    """Three digits in the fitting multiple: "107 GFLOP"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def limit_s(machine: Mapping[str, Any], need: Mapping[str, float], dtype: str = "float32") -> dict[str, float]:
    """Seconds that an iteration needs at least, by what it needs them for."""
    return {
        "arithmetic": need["flops"] / machine["flops_per_s"][dtype],
        "memory": need["update_bytes"] / machine["stream_bytes_per_s"],
        "loop": machine["empty_loop_s"],
    }


def diagnose(
    machine: Mapping[str, Any],
    need: Mapping[str, float],
    iter_s: float,
    parts_ns: Mapping[str, float] | None,
    dtype: str = "float32",
    whole: bool = False,
) -> dict[str, Any]:
    """Share of the limit, MFU, and the bottleneck with the setting that would help.

    Args:
        iter_s: measured seconds of an iteration.
        parts_ns: mean nanoseconds of ``data``, ``hooks``, ``logging`` an iteration, where they were measured.
        dtype: in which it multiplies.
        whole: whether the iteration is one compiled call already.
    """
    least = limit_s(machine, need, dtype)
    parts = parts_ns or {}
    data, hooks = parts.get("data", 0.0) / 1e9, (parts.get("hooks", 0.0) + parts.get("logging", 0.0)) / 1e9
    overhead = min(iter_s, need["operations"] * machine["operation_s"] + machine["empty_loop_s"])
    spent = {"data": data, "hooks": hooks, "overhead": overhead, "memory": least["memory"]}
    spent["arithmetic"] = max(0.0, iter_s - sum(spent.values()))  # in kernels, at the peak rate or below
    bottleneck = max(spent, key=lambda name: spent[name])
    advice = WHOLE if whole and bottleneck == "overhead" else CHOICES[bottleneck]
    share, mfu = sum(least.values()) / iter_s, least["arithmetic"] / iter_s
    sentences = [
        f"limit: {duration(1e9 * sum(least.values())).strip()} an iteration; reached: {share:.1%}, MFU {mfu:.1%}",
        f"  {quantity(need['flops'], 'FLOP')} at {quantity(machine['flops_per_s'][dtype], 'FLOP/s')}, clip and update "
        f"{quantity(need['update_bytes'], 'B')} at {quantity(machine['stream_bytes_per_s'], 'B/s')}",
        f"bottleneck: {bottleneck} ({min(1.0, spent[bottleneck] / iter_s):.0%})",
        f"  what would help: {advice}",
    ]
    if bottleneck == "arithmetic" and dtype == "float32":  # naming precision is only useful where it is faster here
        gain = machine["flops_per_s"]["bfloat16"] / machine["flops_per_s"]["float32"]
        sentences.append(f"  bfloat16 multiplies {gain:.1f} times as fast as float32 here")
    return {"least_s": least, "spent_s": spent, "share": share, "mfu": mfu, "bottleneck": bottleneck,
            "advice": advice, "sentences": sentences}  # fmt: skip
