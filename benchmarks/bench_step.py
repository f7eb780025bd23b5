"""What does an iteration cost, whole iterations through the runner, by recipe and by hand?

Cases: Linear(8, 8) with SGD(momentum); an MLP 64-128-128-10, batch 32, with AdamW and clipping; ResNet-18 at 32 x 32,
batch 32; a GPT of 4 layers, width 128, 64 tokens, batch 16.
Peers, by hand: a loop with torch's fused=True optimizer (the fastest eager one), torch.compile of the model with it.
Bars, at one thread: graph on Linear at most 20 us between due points and 10 times the loop by hand; MLP 2.6 times the
loop by hand and 2 times torch.compile. At two threads: ResNet-18 1.8 times eager float32, precision and layout free;
GPT 1.10 times eager at equal precision.
Gate: tests/step must be green first.

Sides take turns in one process; a sample is the mean over the iterations of a round, a ratio is of medians.
"""

from __future__ import annotations

import argparse
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
from torch import nn
from torch.nn import functional as F

from fastrunner import IterBasedRunner
from fastrunner.bench import machine
from fastrunner.bench.measure import Window, interleaved

RECORDS = Path(__file__).resolve().parent / "records"
NEVER = 10**9
LEAD = 5  # iterations before the clock starts: the first look, and the compiled one


class Model(nn.Module):
    """Cross-entropy of a body's scores."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def train_step(self, batch: dict[str, Any], optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        loss = F.cross_entropy(self.body(batch["x"]).float().flatten(0, -2), batch["y"].flatten())
        return {"loss": loss, "log_vars": {"loss": loss.detach()}, "num_samples": len(batch["y"])}


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()),
            *(nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)),
        )
        same = inner == outer and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))  # fmt: skip # noqa: E501

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inner = 64
    for outer in (64, 128, 256, 512):
        layers += [Residual(inner, outer, 1 if outer == 64 else 2), Residual(outer, outer, 1)]
        inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, 4, w // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, w))
        return x + self.mlp(self.n2(x))


class Gpt(nn.Module):
    def __init__(self, width: int = 128, tokens: int = 64, words: int = 256) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(words, width), nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.positions)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def labelled(shape: tuple[int, ...], classes: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(shape), "y": torch.randint(0, classes, shape[:1])}


def text() -> dict[str, torch.Tensor]:
    x = torch.randint(0, 256, (16, 64))
    return {"x": x, "y": x.roll(-1, 1)}


def sgd(params: Any, **options: Any) -> Any:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, **options)


def adamw(params: Any, **options: Any) -> Any:
    return torch.optim.AdamW(params, lr=1e-3, **options)


# name -> (body, batch, optimizer, max_norm, threads, iterations a round, the graph's options, its bar over each peer)
CASES: dict[str, tuple[Any, ...]] = {
    "linear": (lambda: nn.Linear(8, 8), lambda: labelled((4, 8), 8), sgd, None, 1, 2000, {}, {"hand": 10.0}),
    "mlp": (mlp, lambda: labelled((32, 64), 10), adamw, 1.0, 1, 300, {}, {"hand": 2.6, "torch.compile": 2.0}),
    "resnet18": (resnet18, lambda: labelled((32, 3, 32, 32), 10), sgd, None, 2, 3,
                 {"amp": "bf16", "channels_last": True}, {"hand": 1.8}),
    "gpt": (Gpt, text, adamw, 1.0, 2, 5, {}, {"hand": 1.1}),
}  # fmt: skip
LINEAR_US = 20.0


def by_hand(model: Model, optimizer: Any, max_norm: float | None) -> Callable[[Window], None]:
    def loop(window: Window) -> None:
        model.train()
        for batch in window:
            loss = model.train_step(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()

    return loop


def by_runner(model: Model, optimizer: Any, max_norm: float | None, step: dict[str, Any], folder: str) -> Any:
    """A loop through one runner, whose graph stays from round to round; the default hooks, nothing due."""
    logger = logging.Logger("bench_step")
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=1, work_dir=folder, logger=logger, step=step)
    runner.register_training_hooks(
        {"policy": "step", "step": [NEVER], "by_epoch": False},
        {"grad_clip": None if max_norm is None else {"max_norm": max_norm}},
        {"interval": NEVER, "save_last": False},
        {"interval": NEVER, "hooks": [{"type": "TextLoggerHook"}]},
    )

    def loop(window: Window) -> None:
        runner._max_iters = runner.iter + len(window)
        runner.run([window], [("train", 1)])

    return loop, runner


def measure(name: str, rounds: int, recipes: list[str]) -> dict[str, Any]:
    body, make_batch, make_optimizer, max_norm, threads, num_iters, options, bars = CASES[name]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batches = [make_batch() for _ in range(4)]
    loops: dict[str, Callable[[Window], None]] = {}
    explained: dict[str, list[str]] = {}
    runners = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Model(body())
        loops["hand"] = by_hand(model, make_optimizer(model.parameters(), fused=True), max_norm)
        if "torch.compile" in recipes:
            model = Model(body())
            model.body = torch.compile(model.body)  # body.compile() compiles nothing of an nn.Sequential
            loops["torch.compile"] = by_hand(model, make_optimizer(model.parameters(), fused=True), max_norm)
        for recipe in (each for each in recipes if each != "torch.compile"):
            model = Model(body())
            step = {"recipe": recipe, **(options if recipe == "graph" else {})}
            loops[recipe], runners[recipe] = by_runner(
                model, make_optimizer(model.parameters()), max_norm, step, folder
            )
        seconds = {}
        for side, loop in loops.items():
            begin = time.perf_counter()
            loop(Window(batches, 8, None))
            seconds[side] = time.perf_counter() - begin
        samples = interleaved({side: _timed(loop, batches, num_iters) for side, loop in loops.items()}, rounds)
        explained = {recipe: runner.step.explain() for recipe, runner in runners.items()}
    medians = {side: statistics.median(each) / 1e3 for side, each in samples.items()}
    return {
        "threads": threads,
        "rounds": rounds,
        "iters_per_round": num_iters,
        "first_seconds": seconds,
        "median_us": medians,
        "min_us": {side: min(each) / 1e3 for side, each in samples.items()},
        "samples_ns": samples,
        "explain": explained,
        "bars": {peer: [medians[peer] / medians["graph"], bar] for peer, bar in bars.items() if peer in medians},
    }


def _timed(loop: Callable[[Window], None], batches: list[Any], num_iters: int) -> Callable[[], float]:
    def sample() -> float:
        window = Window(batches, num_iters, None, LEAD)
        loop(window)
        return window.ns_per_iter

    return sample


def report(name: str, result: dict[str, Any]) -> bool:
    print(f"{name}: {result['threads']} threads, {result['rounds']} rounds of {result['iters_per_round']}")
    for side, median in result["median_us"].items():
        first = result["first_seconds"][side]
        print(f"  {side:<14} median {median:10.1f} us  min {result['min_us'][side]:10.1f}  first 8 in {first:6.1f} s")
    for recipe, lines in result["explain"].items():
        print(f"  {recipe}: " + "; ".join(lines))
    met = True
    for peer, (ratio, bar) in result["bars"].items():
        met &= ratio >= bar
        print(f"  {'met' if ratio >= bar else 'MISSED'}: {ratio:.2f} times {peer}, at least {bar}")
    if name == "linear":
        us = result["min_us"]["graph"]
        met &= us <= LINEAR_US
        print(f"  {'met' if us <= LINEAR_US else 'MISSED'}: {us:.1f} us at best, at most {LINEAR_US:.0f}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recipes", nargs="+", default=["fused", "graph", "torch.compile"])
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    results, met = {}, True
    for name in arguments.cases:
        results[name] = measure(name, arguments.rounds, arguments.recipes)
        met &= report(name, results[name])
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_step.json"
        path.write_text(json.dumps(dict(machine=facts, met=met, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
