"""What does recipe auto cost before it has decided, and is it ever slower afterwards?

Cases: the twelve families of tests/step/zoo.py, each as it is in the tests (tiny: what is left is overhead).
Bars: once it is settled, not slower than eager by more than 2 % (the lower bound of the interval over paired rounds),
and a switch only for a gain over 5 %; time to the first trained batch at most 5 % over eager's; throughput while it
compiles at least 60 % of eager's on 2 cores.
Gate: tests/step must be green first.

``settled``: sides take turns in one process, after auto has had ``--settle`` seconds. ``first``: fresh processes in
turns, from the call of run() to the end of the first iteration. ``meanwhile``: one process, eager for a while, then
auto from an empty cache until its compile is over. The last two on ResNet-18 at 32 x 32, batch 32, of bench_step.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_step import CASES, LEAD, NEVER, RECORDS, Model

from fastrunner import IterBasedRunner
from fastrunner.bench import machine
from fastrunner.bench.measure import Window, interleaved
from fastrunner.bench.statistics import change

TESTS = Path(__file__).resolve().parents[1] / "tests"
SLOWER = 1.02
FIRST = 1.05
MEANWHILE = 0.60


def zoo() -> dict[str, Any]:
    """The families of the tests."""
    sys.path.insert(0, str(TESTS))
    from step.zoo import ZOO

    return dict(ZOO)


def make_runner(model: Any, optimizer: Any, clip: float | None, recipe: str, folder: str, iters: int = 1) -> Any:
    """The default hooks, nothing due."""
    logger = logging.Logger("bench_auto")
    runner = IterBasedRunner(
        model, optimizer=optimizer, max_iters=iters, work_dir=folder, logger=logger, step={"recipe": recipe}
    )
    runner.register_training_hooks(
        {"policy": "step", "step": [NEVER], "by_epoch": False},
        {"grad_clip": None if clip is None else {"max_norm": clip}},
        {"interval": NEVER, "save_last": False},
        {"interval": NEVER, "hooks": [{"type": "TextLoggerHook"}]},
    )
    return runner


def run_for(runner: Any, batches: list[Any], seconds: float, done: Callable[[], bool] = lambda: False) -> float:
    """Train for so long, or until ``done``; iterations a second."""
    begin, first = time.perf_counter(), runner.iter
    runner._max_iters = NEVER

    class Source(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from batches
                if time.perf_counter() - begin > seconds or done():
                    runner.stop("seen enough")

    runner.run([Source(batches)], [("train", 1)])
    return (runner.iter - first) / (time.perf_counter() - begin)


def settled(name: str, settle: float, rounds: int, folder: str) -> dict[str, Any]:
    """Paired rounds of eager and auto on one family."""
    family = zoo()[name]
    batches = [family.batch(number) for number in range(4)]
    sides: dict[str, Callable[[], float]] = {}
    runners = {}
    for recipe in ("eager", "auto"):
        torch.manual_seed(0)
        model = family.model()
        runners[recipe] = make_runner(model, family.optimizer(model.parameters()), family.clip, recipe, folder)
    auto = runners["auto"].step._auto
    run_for(runners["auto"], batches, settle, lambda: auto.settled)
    num_iters = max(20, round(0.05 * run_for(runners["eager"], batches, 0.5)))
    for recipe, runner in runners.items():
        sides[recipe] = _timed(runner, batches, num_iters)
    samples = interleaved(sides, rounds)
    difference = change([samples["auto"]], [samples["eager"]])
    return {
        "settled": auto.settled,
        "median_us": {side: statistics.median(each) / 1e3 for side, each in samples.items()},
        "ratio": [1 + difference.low, 1 + difference.median, 1 + difference.high],
        "samples_ns": samples,
        "explain": runners["auto"].step.explain(),
    }


def _timed(runner: Any, batches: list[Any], num_iters: int) -> Callable[[], float]:
    def sample() -> float:
        window = Window(batches, num_iters, None, LEAD)
        runner._max_iters = runner.iter + len(window)
        runner.run([window], [("train", 1)])
        return window.ns_per_iter

    return sample


def resnet(recipe: str, folder: str, iters: int = NEVER) -> tuple[Any, list[Any]]:
    body, make_batch, make_optimizer, clip, threads, *_ = CASES["resnet18"]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Model(body())
    batches = [make_batch() for _ in range(4)]
    return make_runner(model, make_optimizer(model.parameters()), clip, recipe, folder, iters), batches


def first(recipe: str) -> None:
    """In a process of its own: print the seconds of a run of one iteration."""
    with tempfile.TemporaryDirectory() as folder:
        runner, batches = resnet(recipe, folder, 1)
        begin = time.perf_counter()
        runner.run([batches], [("train", 1)])
        print(time.perf_counter() - begin)


def first_batches(rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {"eager": [], "auto": []}
    for _ in range(rounds):
        for recipe, each in samples.items():
            command = [sys.executable, __file__, "--first", recipe]
            each.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return samples


def meanwhile(seconds: float, folder: str) -> dict[str, Any]:
    """Iterations a second of eager, and of auto while it compiles from nothing."""
    eager, batches = resnet("eager", folder)
    run_for(eager, batches, 2)
    below = run_for(eager, batches, seconds)
    auto, batches = resnet("auto", folder)
    state = auto.step._auto

    def compiled() -> bool:
        return state.settled or (state._whole == "" and state._since > 3)

    begin = time.perf_counter()
    ours = run_for(auto, batches, 600, compiled)
    took = time.perf_counter() - begin
    again = run_for(eager, batches, seconds)
    return {"eager": [below, again], "auto": ours, "ratio": ours / max(below, again), "compile_s": took}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["settled", "first", "meanwhile"])
    parser.add_argument("--families", nargs="+", default=list(zoo()), help="of tests/step/zoo.py (default: all)")
    parser.add_argument("--settle", type=float, default=300.0, help="seconds for auto to decide (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--first", metavar="RECIPE", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    if arguments.first:
        first(arguments.first)
        return 0
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    results: dict[str, Any] = {}
    met = True
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTRUNNER_CACHE"] = folder
        if "settled" in arguments.parts:
            torch.set_num_threads(1)
            for name in arguments.families:
                result = results[name] = settled(name, arguments.settle, arguments.rounds, folder)
                low, value, high = result["ratio"]
                met &= result["settled"] and low <= SLOWER
                words = "met" if low <= SLOWER else "MISSED"
                print(f"{name:<14} {words}: {value:.3f} of eager [{low:.3f}, {high:.3f}], settled: {result['settled']}")
                print("  " + "; ".join(result["explain"]))
        if "first" in arguments.parts:
            samples = results["first"] = first_batches(arguments.rounds)
            ratio = statistics.median(samples["auto"]) / statistics.median(samples["eager"])
            met &= ratio <= FIRST
            print(f"first batch: {ratio:.3f} of eager's, at most {FIRST}: {'met' if ratio <= FIRST else 'MISSED'}")
        if "meanwhile" in arguments.parts:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "code")
            result = results["meanwhile"] = meanwhile(20, folder)
            met &= result["ratio"] >= MEANWHILE
            words = "met" if result["ratio"] >= MEANWHILE else "MISSED"
            took, ratio = result["compile_s"], result["ratio"]
            print(f"while compiling ({took:.0f} s): {ratio:.2f} of eager, at least {MEANWHILE}: {words}")
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_auto.json"
        path.write_text(json.dumps(dict(machine=facts, met=met, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
