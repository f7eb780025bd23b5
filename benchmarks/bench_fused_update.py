"""What does clipping and updating cost, in one pass and in torch's several?

    clip to a joint L2 norm that bites, then SGD with momentum
    over the 161 tensors of ResNet-50 (25.6 M floats), and over many tensors of 64 floats
Floor (limit): a bare stream that reads the gradients, and a bare stream with the update's mix of reads and writes,
compiled here for this CPU and run on the same memory in the same rounds. Peers: torch.optim.SGD with fused=True and
with foreach=True, each behind torch.nn.utils.clip_grad_norm_.
Bars: on ResNet-50 at most 0.80 of torch fused, and 90 % of the limit (smallest against smallest); on 160 small tensors
at most 0.05 of torch fused; on 5,000 at most 0.2 us a tensor.
Gate: tests/optim/test_fused.py must be green first.

Gradients come from a backward pass before each sample, outside of the clock, as in training: other addresses each time,
and tensors that Python has not seen. The loss stays alive, as a runner's outputs do. Cases take turns. Python's garbage
collector waits: walking through all objects before a sample would leave none of the optimizer's in the cache.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrunner.bench import machine
from fastrunner.bench.measure import Timing
from fastrunner.optim import FusedSGD

RECORDS = Path(__file__).resolve().parent / "records"
MAX_NORM = 1.0  # below every norm here: the gradients are scaled
OPTIONS: dict[str, Any] = dict(lr=1e-3, momentum=0.9)

Sample = Callable[[], float]

STREAMS = """
// No chunks, no tables, no order of summation: as fast as this CPU goes through the memory.
extern "C" float read_stream(const float* g, long n) {
  float sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
  for (long i = 0; i < n; ++i) sum += g[i] * g[i];
  return sum;
}
extern "C" void update_stream(float* p, const float* g, float* m, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; ++i) {
    m[i] = 0.9f * m[i] + g[i];
    p[i] -= 1e-3f * m[i];
  }
}
extern "C" void update_stream_writing_back(float* p, float* g, float* m, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; ++i) {
    g[i] *= 0.99f;
    m[i] = 0.9f * m[i] + g[i];
    p[i] -= 1e-3f * m[i];
  }
}
"""


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


class Case:
    """One optimizer with parameters of its own; calling it gives the nanoseconds of one clipped step."""

    def __init__(
        self, shapes: list[tuple[int, ...]], make: Callable[[list[nn.Parameter]], Callable[[], object]]
    ) -> None:
        self.params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.gradients = [torch.randn(shape) for shape in shapes]
        self.step = make(self.params)
        self.losses: list[Tensor] = []
        for _ in range(3):  # momentum buffers, tables, threads
            self()

    def __call__(self) -> float:
        for p in self.params:
            p.grad = None
        self.losses = [(p * g).sum() for p, g in zip(self.params, self.gradients, strict=True)]
        torch.autograd.backward(self.losses)
        start = time.perf_counter_ns()
        self.step()
        return time.perf_counter_ns() - start


def fastrunner_step(write_back: bool) -> Callable[[list[nn.Parameter]], Callable[[], object]]:
    def make(params: list[nn.Parameter]) -> Callable[[], object]:
        optimizer = FusedSGD(params, **OPTIONS)
        return lambda: optimizer.clipped_step(MAX_NORM, write_back=write_back)

    return make


def torch_step(**kind: bool) -> Callable[[list[nn.Parameter]], Callable[[], object]]:
    def make(params: list[nn.Parameter]) -> Callable[[], object]:
        optimizer = torch.optim.SGD(params, **OPTIONS, **kind)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        return step

    return make


STEPS = {
    "fastrunner": fastrunner_step(write_back=True),
    "fastrunner, no write-back": fastrunner_step(write_back=False),
    "torch fused": torch_step(fused=True),
    "torch foreach": torch_step(foreach=True),
}


def streams(num_floats: int) -> dict[str, Sample]:
    """The limit, as two samples that add up, on arrays of as many floats; the second also with written gradients."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "streams.cpp"), Path(folder, "streams.so")
        source.write_text(STREAMS)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        built = ctypes.CDLL(str(library))  # after torch: on torch's OpenMP threads
    p, g, m = (torch.randn(num_floats) for _ in range(3))
    size = ctypes.c_long(num_floats)

    def sample(name: str, *arrays: Tensor) -> Sample:
        addresses = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
        function = getattr(built, name)

        def run() -> float:
            start = time.perf_counter_ns()
            function(*addresses, size)
            elapsed = time.perf_counter_ns() - start
            assert arrays  # keeps the memory
            return elapsed

        return run

    return {
        "read stream": sample("read_stream", g),
        "update stream": sample("update_stream", p, g, m),
        "update stream writing back": sample("update_stream_writing_back", p, g, m),
    }


def measure(workload: str, rounds: int) -> dict[str, Timing]:
    shapes, share = WORKLOADS[workload]
    cases: dict[str, Sample] = {name: Case(shapes, make) for name, make in STEPS.items()}
    if workload == "resnet50":
        cases |= streams(sum(p.numel() for p in cases["fastrunner"].params))  # type: ignore[attr-defined]
    samples: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    for number in range(max(1, int(rounds * share))):
        for name in reversed(cases) if number % 2 else cases:
            samples[name].append(cases[name]())
    gc.enable()
    gc.collect()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def report(workload: str, threads: int, timings: dict[str, Timing]) -> list[dict[str, Any]]:
    print(f"\n{workload}, {threads} thread{'s' * (threads > 1)}      median        min       mad   (us)")
    for name, timing in timings.items():
        print(f"  {name:<28} {timing.median_ns / 1e3:10.1f} {timing.min_ns / 1e3:10.1f} {timing.mad_ns / 1e3:9.1f}")
    ours, fused = timings["fastrunner"], timings["torch fused"]
    found: list[tuple[str, float, float]] = []  # what, found, allowed at most
    if workload == "resnet50":
        found.append(("of torch fused, medians", ours.median_ns / fused.median_ns, 0.80))
        for name, update in (
            ("fastrunner", "update stream writing back"),
            ("fastrunner, no write-back", "update stream"),
        ):
            limit = timings["read stream"].min_ns + timings[update].min_ns
            found.append((f"of the limit, minima ({name})", timings[name].min_ns / limit, 1 / 0.90))
    elif workload == "160 x 64":
        found.append(("of torch fused, medians", ours.median_ns / fused.median_ns, 0.05))
    else:
        found.append(("us a tensor, median", ours.median_ns / 1e3 / len(WORKLOADS[workload][0]), 0.2))
    for what, value, allowed in found:
        print(f"  {'met   ' if value <= allowed else 'MISSED'} {value:6.3f} {what}, at most {allowed:.3f}")
    return [dict(what=what, found=value, allowed=allowed, met=value <= allowed) for what, value, allowed in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="samples a case (ten times as many for 160 x 64)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: see fused_update_cuda.py")
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
            timings = measure(workload, arguments.rounds)
            bars = report(workload, threads, timings)
            times = {name: timing.summary() for name, timing in timings.items()}
            results.append(dict(workload=workload, threads=threads, load_before=load, bars=bars, times=times))
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
