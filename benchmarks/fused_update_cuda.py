"""The same question on a GPU: what share of its memory's bandwidth do norm, clip, update and average reach?

    bench_fused_update.py --device cuda

Peers: torch.optim with fused=True behind clip_grad_norm_, and an average by two foreach passes; apex's FusedSGD and
FusedAdam behind its own clip_grad_norm_, where apex is installed.
Floor: bytes that the maths has to move (kernels/sgd.py and adam.py count them), at the bandwidth of a large copy on the
same GPU in the same rounds.
Gate: `make test-cuda` must be green first.

Device time lies between two events behind a kernel that keeps the GPU busy while the host prepares the step: no gap
between launches is in it. Host time is what a step takes to return. Gradients come from a backward pass before each
sample, at other addresses each time. Cases take turns. No number of it stands anywhere that was not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrunner.bench import machine
from fastrunner.bench.measure import Timing
from fastrunner.optim import EmaTerm, FusedAdamW, FusedSGD

MAX_NORM = 1.0  # below every norm here: the gradients are scaled
EMA_MOMENTUM = 2e-4
BUSY_CYCLES = 20_000_000  # some 10 ms, and more where the host needs longer to launch a step
COPY_FLOATS = 64 * 2**20  # 256 MiB: no cache holds it
SGD: dict[str, Any] = dict(lr=1e-3, momentum=0.9)
ADAMW: dict[str, Any] = dict(lr=1e-3, weight_decay=1e-2)

Shapes = list[tuple[int, ...]]
Step = Callable[[], object]


class Sample(NamedTuple):
    device_ns: float
    host_ns: float


class Recipe(NamedTuple):
    """What is compared: bytes a parameter that have to be moved, and steps by whose they are."""

    bytes_each: int
    steps: dict[str, Callable[[list[nn.Parameter]], Step]]


def ours(optimizer: type, options: dict[str, Any], *, ema: bool, write_back: bool) -> Any:
    def make(params: list[nn.Parameter]) -> Step:
        fused = optimizer(params, **options)
        averages = [p.detach().clone() for p in params]
        term = EmaTerm(params, averages, EMA_MOMENTUM) if ema else None
        return lambda: fused.step(max_norm=MAX_NORM, write_back=write_back, ema=term)

    return make


def torchs(optimizer: type, options: dict[str, Any], *, ema: bool) -> Any:
    return composite(optimizer, {**options, "fused": True}, torch.nn.utils.clip_grad_norm_, ema=ema)


def composite(optimizer: type, options: dict[str, Any], clip: Callable[..., Any], *, ema: bool) -> Any:
    def make(params: list[nn.Parameter]) -> Step:
        stepped = optimizer(params, **options)
        values, averages = [p.detach() for p in params], [p.detach().clone() for p in params]

        def step() -> None:
            clip(params, MAX_NORM)
            stepped.step()
            if ema:
                torch._foreach_mul_(averages, 1 - EMA_MOMENTUM)
                torch._foreach_add_(averages, values, alpha=EMA_MOMENTUM)

        return step

    return make


def recipes() -> dict[str, Recipe]:
    """Bytes a float32 parameter: 4 for the norm, 20 or 28 for the update, 8 for the average; 4 for writing back."""
    found = {
        "clip + SGD(momentum)": Recipe(4 + 20, of(FusedSGD, torch.optim.SGD, SGD, ema=False)),
        "clip + AdamW": Recipe(4 + 28, of(FusedAdamW, torch.optim.AdamW, ADAMW, ema=False)),
        "clip + AdamW + EMA": Recipe(4 + 28 + 8, of(FusedAdamW, torch.optim.AdamW, ADAMW, ema=True)),
    }
    try:
        from apex.contrib.clip_grad import clip_grad_norm_
        from apex.optimizers import FusedAdam as ApexAdam
        from apex.optimizers import FusedSGD as ApexSGD
    except ImportError as error:
        print(f"apex is not a row: {error}")
        return found
    found["clip + SGD(momentum)"].steps["apex"] = composite(ApexSGD, SGD, clip_grad_norm_, ema=False)
    for name, ema in (("clip + AdamW", False), ("clip + AdamW + EMA", True)):
        found[name].steps["apex"] = composite(ApexAdam, {**ADAMW, "adam_w_mode": True}, clip_grad_norm_, ema=ema)
    return found


def of(mine: type, theirs: type, options: dict[str, Any], *, ema: bool) -> dict[str, Any]:
    return {
        "fastrunner": ours(mine, options, ema=ema, write_back=False),
        "fastrunner, writing back": ours(mine, options, ema=ema, write_back=True),
        "torch fused": torchs(theirs, options, ema=ema),
    }


class Case:
    """One optimizer with parameters of its own; calling it takes a sample of one step."""

    def __init__(self, shapes: Shapes, make: Callable[[list[nn.Parameter]], Step], device: torch.device) -> None:
        self.params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        self.gradients = [torch.randn(shape, device=device) for shape in shapes]
        self.step = make(self.params)
        self.losses: list[Tensor] = []
        self.cycles = BUSY_CYCLES
        for _ in range(3):  # state, tables, compiled kernels
            taken = self()
        self.cycles += int(3 * taken.host_ns)  # no GPU's clock reaches 3 GHz

    def __call__(self) -> Sample:
        for p in self.params:
            p.grad = None
        self.losses = [(p * g).sum() for p, g in zip(self.params, self.gradients, strict=True)]
        torch.autograd.backward(self.losses)
        return sample(self.step, self.cycles)


def sample(step: Step, cycles: int) -> Sample:
    """Device and host time of what ``step`` launches, behind a kernel of so many cycles."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(cycles)
    start.record()
    before = time.perf_counter_ns()
    step()
    host_ns = time.perf_counter_ns() - before
    end.record()
    torch.cuda.synchronize()
    return Sample(start.elapsed_time(end) * 1e6, host_ns)


def copy_step(device: torch.device) -> Step:
    source, target = torch.ones(COPY_FLOATS, device=device), torch.empty(COPY_FLOATS, device=device)
    return lambda: target.copy_(source)


def measure(shapes: Shapes, recipe: Recipe, rounds: int, device: torch.device) -> dict[str, dict[str, Timing]]:
    cases: dict[str, Callable[[], Sample]] = {name: Case(shapes, make, device) for name, make in recipe.steps.items()}
    copy = copy_step(device)
    cases["copy"] = lambda: sample(copy, BUSY_CYCLES)
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    gc.disable()
    for number in range(rounds):
        for name in reversed(cases) if number % 2 else cases:
            samples[name].append(cases[name]())
    gc.enable()
    gc.collect()
    return {
        name: {kind: Timing(tuple(getattr(s, kind) for s in taken)) for kind in Sample._fields}
        for name, taken in samples.items()
    }


def report(title: str, num_floats: int, bytes_each: int, timings: dict[str, dict[str, Timing]]) -> list[dict[str, Any]]:
    """Print a table, and give its rows."""
    bandwidth = 2 * 4 * COPY_FLOATS / timings["copy"]["device_ns"].min_ns  # GB/s
    limit_ns = num_floats * bytes_each / bandwidth
    peak = peak_bandwidth()
    print(f"\n{title}: {num_floats:,} floats, {bytes_each} B each; a copy reaches {bandwidth:,.0f} GB/s", end="")
    print(f", {bandwidth / peak:.0%} of the memory's {peak:,.0f}" if peak else "")
    print(f"  {'':<26} {'device us':>10} {'min':>9} {'host us':>9}   share of the copy's bandwidth")
    rows = []
    for name, timing in timings.items():
        if name == "copy":
            continue
        device, host = timing["device_ns"], timing["host_ns"]
        share = limit_ns / device.min_ns
        times = (device.median_ns / 1e3, device.min_ns / 1e3, host.median_ns / 1e3)
        print(f"  {name:<26} {times[0]:10.1f} {times[1]:9.1f} {times[2]:9.1f}  {share:6.0%}")
        rows.append(dict(name=name, share=share, device=device.summary(), host=host.summary()))
    return rows


def peak_bandwidth() -> float | None:
    """Of the GPU's memory in GB/s, as the driver describes it; None where it does not."""
    properties = torch.cuda.get_device_properties(0)
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return 2 * clock * width / 8 / 1e6 if clock and width else None  # kHz, bits; two transfers a clock


def main(workloads: dict[str, tuple[Shapes, float]], arguments: argparse.Namespace, records: Path) -> int:
    """Measure, print, and record if asked to; 0 if it could be done."""
    if not torch.cuda.is_available():
        print("--device cuda: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts = machine.facts(device)
    print(f"{facts['gpu']}, torch {facts['torch']}, {facts['cpu']}, load {facts['load'][0]:.2f}")
    results = []
    for workload in arguments.workloads:
        shapes, share = workloads[workload]
        num_floats = sum(torch.Size(shape).numel() for shape in shapes)
        for name, recipe in recipes().items():
            timings = measure(shapes, recipe, max(1, int(arguments.rounds * share)), device)
            rows = report(f"{workload}, {name}", num_floats, recipe.bytes_each, timings)
            copy_ns = timings["copy"]["device_ns"].summary()
            results.append(dict(workload=workload, recipe=name, copy=copy_ns, rows=rows))
    if arguments.record:
        records.mkdir(exist_ok=True)
        path = records / f"{time.strftime('%Y-%m-%d')}_fused_update_cuda.json"
        path.write_text(json.dumps(dict(machine=facts, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0
