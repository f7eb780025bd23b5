"""What do the pieces of dispatch cost?

  idle stage       firing a stage that nobody acts on.  Floor: the empty loop around it.  Bar: 30 ns.
  one called hook  firing a stage with one hook.  Floor: calling its method.  Bar: 100 ns over the floor.
  lr, 161 groups   policies by iteration over 161 param groups: step where the lr stays, poly where it changes.
                   Floor: the same run with one param group.  Bars: 2 us and 20 us.
  a due log        the iteration that logs 50 iterations, on the loop's thread (its CPU time), less one that does not.
                   Bar: 150 us with the default keys (loss, grad_norm, two times); and with ten losses, to compare.
  memory           blocks that Python holds after 100,000 iterations with 12 log keys, against 10,000.

Gate: tests/plan must be green first. Cases take turns; medians and minima of many rounds; one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import nn

from fastrunner import Hook, IterBasedRunner
from fastrunner.bench import machine
from fastrunner.bench.measure import interleaved
from fastrunner.bench.tax import NEVER, NoopModel, NoopOptimizer
from fastrunner.plan.dispatch import HookPlan

RECORDS = Path(__file__).resolve().parent / "records"
LOOPS = 10_000


class One(Hook):
    def after_train_epoch(self, runner):
        pass


def looped(body: Callable[[], None]) -> Callable[[], float]:
    def sample() -> float:
        begin = time.perf_counter_ns()
        for _ in range(LOOPS):
            body()
        return (time.perf_counter_ns() - begin) / LOOPS

    return sample


def dispatch(rounds: int) -> dict[str, list[float]]:
    hook = One()
    plan = HookPlan([hook])
    fire, nobody, one, method = plan.fire, plan.before_val_epoch, plan.after_train_epoch, hook.after_train_epoch

    def empty() -> None:
        pass

    def idle() -> None:  # as the iteration does it
        if nobody:
            for call in nobody:
                call(None)

    def bare() -> None:
        method(None)

    def fired() -> None:
        fire(one, None)

    cases = {"empty": empty, "idle stage": idle, "bare call": bare, "one called hook": fired}
    return interleaved({name: looped(body) for name, body in cases.items()}, rounds)


class Groups(NoopModel):
    """161 parameters, each a param group of its own."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(num_groups))


def policy(rounds: int) -> dict[str, list[float]]:
    """ns an iteration in which a constant stretch is written or changes, seen from the data source."""
    logger = logging.Logger("quiet", logging.CRITICAL)

    def run(num_groups: int, config: dict) -> Callable[[], float]:
        def sample() -> float:
            model = Groups(num_groups)
            optimizer = NoopOptimizer([dict(params=[weight]) for weight in model.weights], lr=0.1)
            runner = IterBasedRunner(model, optimizer=optimizer, max_iters=200, logger=logger)
            runner.register_training_hooks(config, {}, None, None)
            asked: list[int] = []
            runner.run([Stamped(asked)], [("train", 1)])
            return median(b - a for a, b in pairwise(asked[100:181]))

        return sample

    configs = dict(constant=dict(policy="step", step=[NEVER]), changing=dict(policy="poly", power=0.9))
    cases = {f"lr, {n} groups, {name}": run(n, config) for n in (1, 161) for name, config in configs.items()}
    return interleaved(cases, rounds)


class Stamped:
    """Batches, and when each was asked for."""

    def __init__(self, asked: list[int]) -> None:
        self.asked = asked

    def __len__(self) -> int:
        return 1000

    def __iter__(self):
        while True:
            self.asked.append(time.perf_counter_ns())
            yield {}


class Tensors(NoopModel):
    """As the step of a real model, makes new tensors."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys = [f"loss_{i}" for i in range(keys)]

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.outputs["log_vars"] = {key: torch.zeros(()) for key in self.keys}
        return self.outputs


def due_log(rounds: int, keys: int) -> dict[str, list[float]]:
    """CPU time of the loop's thread in iterations that log, and in others."""
    due, not_due = f"log due, {keys} losses", f"not due, {keys} losses"
    spent: dict[str, list[float]] = {due: [], not_due: []}
    with tempfile.TemporaryDirectory() as folder:
        logger = logging.Logger("file", logging.INFO)
        logger.addHandler(logging.FileHandler(Path(folder) / "run.log"))
        for _ in range(rounds):
            model = Tensors(keys)
            optimizer = NoopOptimizer(model.parameters(), lr=0.1)
            runner = IterBasedRunner(model, optimizer=optimizer, max_iters=1001, logger=logger, work_dir=folder)
            log = dict(interval=50, hooks=[dict(type="TextLoggerHook")])
            runner.register_training_hooks(None, dict(grad_clip=dict(max_norm=1.0)), None, log)
            asked: list[int] = []
            runner.run([ThreadStamped(asked)], [("train", 1)])
            took = [b - a for a, b in pairwise(asked)]
            # The log of iteration i is between asking for batch i and for batch i + 1.
            spent[due].append(median(took[i] for i in range(149, 1000, 50)))
            spent[not_due].append(median(took[i] for i in range(130, 1000, 50)))
    return spent


class ThreadStamped(Stamped):
    def __iter__(self):
        while True:
            self.asked.append(time.thread_time_ns())
            yield {}


def memory() -> dict[str, int]:
    """Blocks that Python holds at iterations 10,000 and 100,000 of one run, with 12 log keys."""

    class Keys(NoopModel):
        def train_step(self, data_batch, optimizer=None, **kwargs):
            self.outputs["log_vars"] = {f"loss_{i}": torch.zeros(()) for i in range(12)}
            return self.outputs

    class Looks(Hook):
        def due(self, runner):
            return next((at for at in (10_000, 100_000) if at > runner.iter), NEVER)

        def after_train_iter(self, runner):
            blocks[runner.iter] = sys.getallocatedblocks()

    blocks: dict[int, int] = {}
    model = Keys()
    with tempfile.TemporaryDirectory() as folder:
        optimizer = NoopOptimizer(model.parameters(), lr=0.1)
        logger = logging.Logger("quiet", logging.CRITICAL)
        runner = IterBasedRunner(model, optimizer=optimizer, max_iters=100_001, logger=logger, work_dir=folder)
        log = dict(interval=50, hooks=[dict(type="TextLoggerHook")])
        runner.register_training_hooks(None, dict(grad_clip=dict(max_norm=1.0)), None, log)
        runner.register_hook(Looks())
        runner.run([[{}] * 1000], [("train", 1)])
    return {"10,000": blocks[10_000], "100,000": blocks[100_000]}


def report(samples: dict[str, list[float]], blocks: dict[str, int]) -> bool:
    def over(case: str, floor: str) -> float:
        return median(a - b for a, b in zip(samples[case], samples[floor], strict=True))

    bars = {
        "idle stage": (over("idle stage", "empty"), 30),
        "one called hook, over its call": (over("one called hook", "bare call"), 100),
        "lr, 161 groups, constant": (over("lr, 161 groups, constant", "lr, 1 groups, constant"), 2_000),
        "lr, 161 groups, changing": (over("lr, 161 groups, changing", "lr, 1 groups, changing"), 20_000),
        "a due log, on the loop's thread": (over("log due, 1 losses", "not due, 1 losses"), 150_000),
        "blocks kept from iteration 10,000 to 100,000": (blocks["100,000"] - blocks["10,000"], 20_000),
    }
    for name, (value, bar) in bars.items():
        unit = "" if "blocks" in name else " ns"
        print(f"{'met' if value <= bar else 'MISSED'}: {name}: {value:,.0f}{unit}, at most {bar:,}")
    for name, each in samples.items():
        print(f"  {name:<28} median {median(each):12,.0f}  min {min(each):12,.0f}  max {max(each):12,.0f} ns")
    return all(value <= bar for value, bar in bars.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    logs = max(5, arguments.rounds // 4)
    samples = dispatch(arguments.rounds) | policy(arguments.rounds) | due_log(logs, 1) | due_log(logs, 10)
    blocks = memory()
    met = report(samples, blocks)
    if arguments.record:
        path = RECORDS / f"{arguments.date}_hook_dispatch.json"
        path.write_text(json.dumps(dict(machine=facts, met=met, samples_ns=samples, blocks=blocks), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
