"""The question of bench_cudagraph.py on a GPU: whole iterations through the runner, by recipe, model and batch size.

Peers by hand: torch's fused=True optimizer in a plain loop, and the same loop with forward and backward captured by
torch.cuda.make_graphed_callables. Sides take turns; a sample is the mean over a round, between two synchronisations.
Reported beside: what the recipe measured before it captured (launching, device, waiting), and the pool's memory.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step import Gpt, Model, mlp, resnet18
from torch import nn

from fastrunner import FusedAdamW, IterBasedRunner
from fastrunner.bench import machine
from fastrunner.bench.measure import interleaved

NEVER = 10**9
DEVICE = "cuda"
LEAD = 40  # iterations before the clock starts: looked at, measured, warmed up, captured
Batch = dict[str, torch.Tensor]


def labelled(shape: tuple[int, ...]) -> Batch:
    return {"x": torch.randn(shape, device=DEVICE), "y": torch.randint(0, 10, shape[:1], device=DEVICE)}


def text(size: int) -> Batch:
    x = torch.randint(0, 256, (size, 64), device=DEVICE)
    return {"x": x, "y": x.roll(-1, 1)}


# name -> (body, batch of a size, batch sizes, iterations a round)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], tuple[int, ...], int]] = {
    "mlp": (mlp, lambda n: labelled((n, 64)), (32, 1024), 500),
    "resnet18 at 32x32": (resnet18, lambda n: labelled((n, 3, 32, 32)), (8, 64, 512), 100),
    "gpt, 4 layers, width 128": (Gpt, text, (4, 16, 128), 100),
}


def by_hand(body: nn.Module, batch: Batch, graphed: bool) -> Callable[[int], None]:
    model = Model(body)
    if graphed:
        model.body = torch.cuda.make_graphed_callables(body, (batch["x"],))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loop(iters: int) -> None:
        for _ in range(iters):
            loss = model.train_step(batch)["loss"]
            optimizer.zero_grad(set_to_none=not graphed)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return loop


def by_runner(body: nn.Module, batch: Batch, recipe: dict[str, Any], folder: str) -> tuple[Callable[[int], None], Any]:
    model, logger = Model(body), logging.Logger("bench_cudagraph")
    optimizer = FusedAdamW(model.parameters(), lr=1e-3)
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=1, work_dir=folder, logger=logger, step=recipe)
    runner.register_training_hooks(
        {"policy": "fixed"},
        {"grad_clip": {"max_norm": 1.0}},
        {"interval": NEVER, "save_last": False},
        {"interval": NEVER, "hooks": [{"type": "TextLoggerHook"}]},
    )

    def loop(iters: int) -> None:
        runner._max_iters = runner.iter + iters
        runner.run([[batch] * iters], [("train", 1)])

    return loop, runner


def measure(name: str, size: int, rounds: int) -> dict[str, Any]:
    body, make_batch, _, iters = CASES[name]
    torch.manual_seed(0)
    batch = make_batch(size)
    recipes: dict[str, dict[str, Any]] = {
        "fused": {"recipe": "fused"},
        "cudagraph": {"recipe": "cudagraph"},
        "cudagraph of graph": {"recipe": "cudagraph", "captures": "graph"},
    }
    loops = {
        "by hand": by_hand(body().to(DEVICE), batch, graphed=False),
        "by hand, graphed": by_hand(body().to(DEVICE), batch, graphed=True),
    }
    runners = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe, step in recipes.items():
            loops[recipe], runners[recipe] = by_runner(body().to(DEVICE), batch, step, folder)
        for loop in loops.values():
            loop(LEAD)
        samples = interleaved({side: _timed(loop, iters) for side, loop in loops.items()}, rounds)
        explained = {recipe: runner.step.explain() for recipe, runner in runners.items()}
    return {
        "batch_size": size,
        "median_us": {side: statistics.median(each) / 1e3 for side, each in samples.items()},
        "min_us": {side: min(each) / 1e3 for side, each in samples.items()},
        "samples_ns": samples,
        "explain": explained,
    }


def _timed(loop: Callable[[int], None], iters: int) -> Callable[[], float]:
    def sample() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        loop(iters)
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - begin) / iters

    return sample


def main(rounds: int, records: Path | None, date: str) -> int:
    """Measure, print, and record if asked to; 0 if it could be done. There is no bar until one was measured."""
    if not torch.cuda.is_available():
        print("--device cuda: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    facts = machine.facts(torch.device("cuda", torch.cuda.current_device()))
    print(f"{facts['gpu']}, torch {facts['torch']}, {facts['cpu']}, load {facts['load'][0]:.2f}")
    results: dict[str, list[dict[str, Any]]] = {}
    for name, (_, _, sizes, _) in CASES.items():
        for size in sizes:
            result = measure(name, size, rounds)
            results.setdefault(name, []).append(result)
            print(f"{name}, batch {size}")
            for side, median in result["median_us"].items():
                best, times = result["min_us"][side], result["median_us"]["by hand"] / median
                print(f"  {side:<20} median {median:10.1f} us  min {best:10.1f}  {times:5.2f} times by hand")
            for recipe, lines in result["explain"].items():
                print(f"  {recipe}: " + "; ".join(lines[1:]))
    if records is not None:
        records.mkdir(exist_ok=True)
        path = records / f"{date}_cudagraph_cuda.json"
        path.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
        print(f"recorded in {path}")
    return 0
