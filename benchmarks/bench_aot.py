"""What does an iteration cost that runs without Python, and does it stay right and small over a million?

Case: Linear(8, 8) with SGD(momentum), batch 4, one thread.
Peers: a loop by hand with torch's fused SGD; the runner under recipe graph.
Bars: through IterBasedRunner.run with the default hooks, between due points, at most 12 us under aot, and at least 15
times faster than the loop by hand; a burst of 100 at most 9 us an iteration. A million iterations: flat memory, and the
graph's weights to the bit.
Gate: tests/core/test_aot_step.py and tests/step/test_aot.py must be green first.

The first call on a machine waits for the library (a minute at most); it then lies in the cache. ``--soak`` runs the
million, under aot and under graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step import CASES, RECORDS, Model, _timed, by_hand, by_runner

from fastrunner._core import AotLibrary, AotStep
from fastrunner.bench import machine
from fastrunner.bench.measure import Window, interleaved
from fastrunner.step import aot_cache
from fastrunner.step.background import Job, whole_order
from fastrunner.step.binding import Binding
from fastrunner.step.trace import trace_step

RUN_US, TIMES_BY_HAND, BURST_US = 12.0, 15.0, 9.0
BURST, NUM_ITERS = 100, 2000
SOAK, STRETCH = 1_000_000, 50_000
GROWTH = 4_000_000  # bytes over the second half of a soak: 8 an iteration; a lost tensor would be some 400
BODY, BATCH, OPTIMIZER, *_ = CASES["linear"]


def bare_step() -> tuple[AotStep, Binding, Any, float]:
    """The library bound to a model, without a runner; compiled if the cache has none. And how long that took, in s."""
    model, batch = Model(BODY()), BATCH()
    optimizer = OPTIMIZER(model.parameters())
    model.train_step(batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    binding = Binding(model, optimizer)
    traced = trace_step(binding, batch, None)
    args = [*binding.static, *batch.values()]
    key, begin = aot_cache.key_of(traced.graph, args), time.perf_counter()
    if aot_cache.find(key) is None:
        job = Job(whole_order(traced.graph, args, key))
        while (why := job.poll()) is None:
            time.sleep(0.2)
        if why:
            raise SystemExit(why)
    seconds, path = time.perf_counter() - begin, aot_cache.find(key)
    step = AotStep(AotLibrary(str(path)), binding.static, binding.written, binding.static[-1], batch)
    binding.fill(None)
    return step, binding, batch, seconds


def bare_loops(step: AotStep, binding: Binding, batch: Any) -> dict[str, Callable[[], float]]:
    """ns an iteration of the bare call, and of bursts of 100."""
    rows = binding.row.repeat(BURST, 1)
    scalars = torch.empty(BURST, len(step(batch) or ()), dtype=torch.float64)

    def call() -> float:
        begin = time.perf_counter_ns()
        for _ in range(NUM_ITERS):
            step(batch)
        return (time.perf_counter_ns() - begin) / NUM_ITERS

    def burst() -> float:
        begin = time.perf_counter_ns()
        for _ in range(NUM_ITERS // BURST):
            completed, _, why = step.burst([batch] * BURST, rows, scalars, 1.0)
            assert (completed, why) == (BURST, "")
        return (time.perf_counter_ns() - begin) / NUM_ITERS

    return {"bare call": call, "burst of 100": burst}


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step, binding, batch, seconds = bare_step()
    batches = [BATCH() for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        model = Model(BODY())
        loops = {"hand": by_hand(model, OPTIMIZER(model.parameters(), fused=True), None)}
        runners = {}
        for recipe in ("graph", "aot"):
            model = Model(BODY())
            options = {"recipe": recipe}
            loops[recipe], runners[recipe] = by_runner(model, OPTIMIZER(model.parameters()), None, options, folder)
        for loop in loops.values():
            loop(Window(batches, 20, None))
        sides = {side: _timed(loop, batches, NUM_ITERS) for side, loop in loops.items()}
        samples = interleaved({**sides, **bare_loops(step, binding, batch)}, rounds)
        explained = {recipe: runner.step.explain() for recipe, runner in runners.items()}
    return {
        "rounds": rounds,
        "compiled_s": seconds,
        "median_us": {side: statistics.median(each) / 1e3 for side, each in samples.items()},
        "min_us": {side: min(each) / 1e3 for side, each in samples.items()},
        "samples_ns": samples,
        "explain": explained,
    }


def report(result: dict[str, Any]) -> bool:
    median, least = result["median_us"], result["min_us"]
    print(f"{result['rounds']} rounds of {NUM_ITERS}, one thread; the library took {result['compiled_s']:.0f} s")
    for side, value in median.items():
        print(f"  {side:<14} median {value:7.2f} us  min {least[side]:7.2f}")
    for recipe, lines in result["explain"].items():
        print(f"  {recipe}: " + "; ".join(lines))
    times, burst_us = median["hand"] / median["aot"], least["burst of 100"]
    bars = [
        (least["aot"] <= RUN_US, f"{least['aot']:.1f} us at best through the runner, at most {RUN_US:.0f}"),
        (times >= TIMES_BY_HAND, f"{times:.1f} times the loop by hand, at least {TIMES_BY_HAND:.0f}"),
        (burst_us <= BURST_US, f"{burst_us:.1f} us at best in a burst, at most {BURST_US:.0f}"),
    ]
    for met, text in bars:
        print(f"  {'met' if met else 'MISSED'}: {text}")
    return all(met for met, _ in bars)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak() -> dict[str, Any]:
    """The same million iterations under both recipes: memory on the way, and whether they end with the same bits."""
    torch.set_num_threads(1)
    bare_step()
    states, memory = {}, {}
    for recipe in ("graph", "aot"):
        torch.manual_seed(0)
        model = Model(BODY())
        optimizer = OPTIMIZER(model.parameters())
        batches = [BATCH() for _ in range(4)]
        with tempfile.TemporaryDirectory() as folder:
            loop, runner = by_runner(model, optimizer, None, {"recipe": recipe}, folder)
            memory[recipe] = []
            for _ in range(SOAK // STRETCH):
                loop(Window(batches, STRETCH, None))
                memory[recipe].append(resident())
            print(f"  {recipe}: " + "; ".join(runner.step.explain()))
        states[recipe] = [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state.values())]
    equal = all(torch.equal(a, b) for a, b in zip(states["graph"], states["aot"], strict=True))
    return {"resident_bytes": memory, "equal_bits": equal}


def report_soak(result: dict[str, Any]) -> bool:
    memory = result["resident_bytes"]["aot"]
    growth = memory[-1] - memory[len(memory) // 2]
    flat = growth <= GROWTH
    print(f"  {'met' if flat else 'MISSED'}: {growth / 1e6:.2f} MB more after the second {SOAK // 2:,} iterations")
    print(f"  {'met' if result['equal_bits'] else 'MISSED'}: weights and momenta equal the graph's to the bit")
    return flat and result["equal_bits"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--soak", action="store_true", help="the million iterations instead of the clock")
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    result = soak() if arguments.soak else measure(arguments.rounds)
    met = report_soak(result) if arguments.soak else report(result)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_aot{'_soak' if arguments.soak else ''}.json"
        path.write_text(json.dumps(dict(machine=facts, met=met, results=result), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
