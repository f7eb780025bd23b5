"""What does a whole update cost, in one pass and in torch's several?

    sgd        clip to a joint L2 norm that bites, then SGD with momentum
    adamw      clip, then AdamW
    composite  clip, AdamW, an average of the weights, gradients set to None
    over the 161 tensors of ResNet-50 (25.6 M floats), and over many tensors of 64 floats
Floor (limit): a bare stream that reads the gradients, and a bare stream with the update's mix of reads and writes,
compiled here for this CPU and run on the same memory in the same rounds. Peers: torch.optim with fused=True behind
torch.nn.utils.clip_grad_norm_, with _foreach_lerp_ for the average and zero_grad(set_to_none=True); DeepSpeed's CPUAdam
where it is installed (below). fastrunner writes clipped gradients back only in the rows that say so, torch always.
Bars on the CPU, medians: of torch's on ResNet-50 sgd 0.80, adamw 0.80 on 1 thread and 0.70 on 2, composite 0.70 and
0.62, and each within 90 % of the limit, smallest against smallest; on 160 small tensors composite 0.05 of torch's; on
5,000 each 0.2 us a tensor.
Gate: tests/optim must be green first.

Gradients come from a backward pass before each sample, outside of the clock, as in training: other addresses each time,
and tensors that Python has not seen. The loss stays alive, as a runner's outputs do. Cases take turns; over small
tensors each has a few iterations in a row, of which the first is not counted: in training no other optimizer runs
between two steps, and here seven others would leave nothing of this one in the cache. Python's garbage collector waits,
since walking through all objects before a sample would leave nothing either.

DeepSpeed, without the packages that only its other parts need, in an environment that may be thrown away; its first
use compiles for minutes:
    pip install --no-deps deepspeed hjson py-cpuinfo msgpack psutil einops pydantic pydantic-core annotated-types \
        typing-inspection tqdm ninja && export PATH=$VIRTUAL_ENV/bin:$PATH

--device cuda: fused_update_cuda.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from streams import Sample, streams
from torch import Tensor, nn

from fastrunner.bench import machine
from fastrunner.bench.measure import Timing
from fastrunner.optim import EmaTerm, FusedAdamW, FusedSGD

RECORDS = Path(__file__).resolve().parent / "records"
MAX_NORM = 1.0  # below every norm here: the gradients are scaled
SGD: dict[str, Any] = dict(lr=1e-3, momentum=0.9)
KINDS = ["sgd", "adamw", "composite"]
MOMENTUM = 2e-4  # of the average

Params = list[nn.Parameter]
Step = Callable[[], object]


def resnet50_shapes() -> Iterator[tuple[int, ...]]:
    """Shapes of ResNet-50's parameters in the order of the model (He et al. 2015, https://arxiv.org/abs/1512.03385)."""

    def conv_norm(num_in: int, num_out: int, size: int) -> Iterator[tuple[int, ...]]:
        yield num_out, num_in, size, size
        yield from ((num_out,), (num_out,))

    yield from conv_norm(3, 64, 7)
    num_in = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            num_out = 4 * width
            yield from conv_norm(num_in, width, 1)
            yield from conv_norm(width, width, 3)
            yield from conv_norm(width, num_out, 1)
            if block == 0:
                yield from conv_norm(num_in, num_out, 1)
            num_in = num_out
    yield 1000, num_in
    yield (1000,)


WORKLOADS: dict[str, tuple[list[tuple[int, ...]], float]] = {  # shapes, share of --rounds
    "resnet50": (list(resnet50_shapes()), 1.0),
    "160 x 64": ([(64,)] * 160, 10.0),
    "5000 x 64": ([(64,)] * 5000, 1.0),
}
IN_A_ROW = 4  # iterations of a case over small tensors before the next one's turn; the first is not counted


class Case:
    """One optimizer with parameters of its own; calling it gives the nanoseconds of one update."""

    def __init__(self, shapes: list[tuple[int, ...]], make: Callable[[Params], Step]) -> None:
        self.params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.gradients = [torch.randn(shape) for shape in shapes]
        self.step = make(self.params)
        self.losses: list[Tensor] = []
        for _ in range(3):  # state, tables, threads
            self()

    def __call__(self) -> float:
        for p in self.params:
            p.grad = None
        self.losses = [(p * g).sum() for p, g in zip(self.params, self.gradients, strict=True)]
        torch.autograd.backward(self.losses)
        start = time.perf_counter_ns()
        self.step()
        return time.perf_counter_ns() - start


def fused_sgd(params: Params, *, write_back: bool) -> Step:
    optimizer = FusedSGD(params, **SGD)
    return lambda: optimizer.step(max_norm=MAX_NORM, write_back=write_back)


def fused_adamw(params: Params, *, write_back: bool) -> Step:
    optimizer = FusedAdamW(params)
    return lambda: optimizer.step(max_norm=MAX_NORM, write_back=write_back)


def fused_composite(params: Params) -> Step:
    optimizer = FusedAdamW(params)
    term = EmaTerm(params, [p.detach().clone() for p in params], MOMENTUM)
    return lambda: optimizer.step(max_norm=MAX_NORM, write_back=False, ema=term, zero=True)


def clipped(optimizer: torch.optim.Optimizer, params: Params) -> Step:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def composite(optimizer: torch.optim.Optimizer, params: Params) -> Step:
    averages, step = [p.detach().clone() for p in params], clipped(optimizer, params)

    def whole() -> None:
        step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, MOMENTUM)  # type: ignore[arg-type]
        optimizer.zero_grad(set_to_none=True)

    return whole


OURS: dict[str, Callable[[Params], Step]] = {
    "sgd": lambda p: fused_sgd(p, write_back=False),
    "sgd, write-back": lambda p: fused_sgd(p, write_back=True),
    "adamw": lambda p: fused_adamw(p, write_back=False),
    "adamw, write-back": lambda p: fused_adamw(p, write_back=True),
    "composite": fused_composite,
}
TORCHS: dict[str, Callable[[Params], Step]] = {
    "sgd, torch": lambda p: clipped(torch.optim.SGD(p, fused=True, **SGD), p),
    "adamw, torch": lambda p: clipped(torch.optim.AdamW(p, fused=True), p),
    "composite, torch": lambda p: composite(torch.optim.AdamW(p, fused=True), p),
}


def deepspeed() -> dict[str, Callable[[Params], Step]]:
    """DeepSpeed's CPUAdam, where it is installed and compiles."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # its row is missing then, and it is said why
        print(f"no DeepSpeed: {type(error).__name__}: {error}")
        return {}
    return {"adamw, deepspeed": lambda p: clipped(DeepSpeedCPUAdam(p, weight_decay=1e-2), p)}


def measure(workload: str, rounds: int, kinds: list[str]) -> dict[str, Timing]:
    shapes, share = WORKLOADS[workload]
    makers = {n: make for n, make in (OURS | TORCHS | deepspeed()).items() if n.split(",")[0] in kinds}
    cases: dict[str, Sample] = {name: Case(shapes, make) for name, make in makers.items()}
    if workload == "resnet50":
        cases |= streams(sum(torch.Size(shape).numel() for shape in shapes), kinds)
    samples: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    in_a_row = 1 if workload == "resnet50" else IN_A_ROW  # of 100 MB nothing is left in the cache anyway
    for number in range(max(1, int(rounds * share) // max(1, in_a_row - 1))):
        for name in reversed(cases) if number % 2 else cases:
            taken = [cases[name]() for _ in range(in_a_row)]
            samples[name] += taken[in_a_row > 1 :]
    gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def bars(workload: str, threads: int, timings: dict[str, Timing]) -> list[tuple[str, float, float]]:
    """(what, found, allowed at most)."""
    found: list[tuple[str, float, float]] = []
    of_torch = {"sgd": 0.80, "adamw": 0.80 if threads == 1 else 0.70, "composite": 0.70 if threads == 1 else 0.62}
    for kind, allowed in of_torch.items():
        if kind not in timings:
            continue
        ours, theirs = timings[kind], timings[f"{kind}, torch"]
        ratio = ours.median_ns / theirs.median_ns
        if workload == "resnet50":
            found.append((f"{kind}: of torch's, medians", ratio, allowed))
            found.append((f"{kind}: of torch's, minima", ours.min_ns / theirs.min_ns, allowed))
            limit = timings["stream, read"].min_ns + timings[f"stream, {kind}"].min_ns
            found.append((f"{kind}: of the limit, minima", ours.min_ns / limit, 1 / 0.90))
        elif workload == "160 x 64":
            if kind == "composite":
                found.append((f"{kind}: of torch's, medians", ratio, 0.05))
                found.append((f"{kind}: of torch's, minima", ours.min_ns / theirs.min_ns, 0.05))
        else:
            found.append((f"{kind}: us a tensor, median", ours.median_ns / 1e3 / len(WORKLOADS[workload][0]), 0.2))
    return found


def report(workload: str, threads: int, timings: dict[str, Timing]) -> list[dict[str, Any]]:
    print(f"\n{workload}, {threads} thread{'s' * (threads > 1)}      median        min       mad   (us)")
    for name, timing in timings.items():
        print(f"  {name:<28} {timing.median_ns / 1e3:10.1f} {timing.min_ns / 1e3:10.1f} {timing.mad_ns / 1e3:9.1f}")
    found = bars(workload, threads, timings)
    for what, value, allowed in found:
        print(f"  {'met   ' if value <= allowed else 'MISSED'} {value:6.3f} {what}, at most {allowed:.3f}")
    return [dict(what=what, found=value, allowed=allowed, met=value <= allowed) for what, value, allowed in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="samples a case (ten times as many for 160 x 64)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: see fused_update_cuda.py")
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        import fused_update_cuda

        return fused_update_cuda.main(WORKLOADS, arguments, RECORDS)
    facts = machine.facts(torch.device("cpu"))
    print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}, torch {facts['torch']}, load {facts['load'][0]:.2f}"
    )
    results = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for workload in arguments.workloads:
            load = os.getloadavg()[0]
            timings = measure(workload, arguments.rounds, arguments.kinds)
            held = report(workload, threads, timings)
            times = {name: timing.summary() for name, timing in timings.items()}
            results.append(dict(workload=workload, threads=threads, load_before=load, bars=held, times=times))
    facts["load_after"] = list(os.getloadavg())
    if facts["noisy"]:
        print("\nThe machine was not quiet when this began: believe the minima, and the ratios of what took turns.")
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{time.strftime('%Y-%m-%d')}_fused_update.json"
        path.write_text(json.dumps(dict(machine=facts, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if all(bar["met"] for result in results for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
