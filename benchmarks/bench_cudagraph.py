"""What does a captured iteration cost the host, and on a GPU, what does capturing gain?

    bench_cudagraph.py                  the host's part, on the CPU: bookkeeping around a replay that does nothing
    bench_cudagraph.py --device cuda    iterations by recipe and batch size, replay and device time, memory

Floor of the first: a call that does nothing, in place of copying the batch in and of the replay. Bar: at most 5 us more
an iteration, for a batch of two tensors and one parameter group (signature, choice of the graph, options, ring,
outputs, version counters). An Adam with clipping, four groups and an average is measured beside it.
Gate: tests/step/test_cudagraph.py must be green first; on a GPU `make test-cuda` as well.

Floor and case take turns. No GPU number of this stands anywhere that was not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastrunner import FusedAdamW
from fastrunner.bench import machine
from fastrunner.optim import EmaTerm
from fastrunner.step.cudagraph import CudaGraphStep
from fastrunner.step.graph_stand_in import StandIn

RECORDS = Path(__file__).resolve().parent / "records"
BAR_US = 5.0
ITERS = 2000  # in a sample


class Model(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def train_step(self, batch: dict[str, Any], optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        loss = F.cross_entropy(self.body(batch["x"]), batch["y"])
        return {"loss": loss, "log_vars": {"loss": loss.detach()}, "num_samples": len(batch["y"])}


class Average:
    """As much of EMAHook as a step asks for: the buffers of its averages are the model's."""

    def __init__(self, model: nn.Module) -> None:
        params = dict(model.named_parameters())
        averages = [param.detach().clone() for param in params.values()]
        for name, average in zip(params, averages, strict=True):
            model.register_buffer(f"ema_{name.replace('.', '_')}", average)
        self._term = EmaTerm(list(params.values()), averages, 0.01)

    def average_at(self, iteration: int) -> EmaTerm:
        return self._term


def linear() -> tuple[Model, Any, float | None, Any]:
    model = Model(nn.Linear(8, 8))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), None, None


def groups() -> tuple[Model, Any, float | None, Any]:
    model = Model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    optimizer = FusedAdamW([{"params": [p]} for p in model.parameters()], lr=1e-3)
    return model, optimizer, 1.0, Average(model)


CASES: dict[str, tuple[Callable[[], Any], float | None]] = {
    "Linear(8, 8), SGD(momentum)": (linear, BAR_US),
    "4 groups, AdamW, clip, average": (groups, None),
}


def captured(make: Callable[[], Any]) -> tuple[CudaGraphStep, dict[str, torch.Tensor]]:
    """A step with one graph, whose replay and copies do nothing from then on."""
    model, optimizer, max_norm, ema = make()
    batch = {"x": torch.randn(4, 8), "y": torch.randint(0, 8, (4,))}
    backend = StandIn()
    step = CudaGraphStep(model, model.train_step, optimizer, print, backend, max_norm, ema)

    def below(_: Any) -> None:
        optimizer.zero_grad()
        model.train_step(batch)["loss"].backward()
        optimizer.step()

    iteration = 0
    while not step.num_calls:
        if step(batch, iteration) is None:
            step.around(below, None)
        iteration += 1
        assert iteration < 100, step.explain()
    for graph in step.graphs:
        graph.replay = nothing
    backend.copy_in = two  # type: ignore[assignment,method-assign]
    return step, batch


def nothing() -> None:
    pass


def two(static: Any, given: Any) -> None:
    pass


def sample(call: Callable[[], object]) -> float:
    """Microseconds a call."""
    begin = time.perf_counter()
    for _ in range(ITERS):
        call()
    return (time.perf_counter() - begin) / ITERS * 1e6


def host(rounds: int) -> tuple[dict[str, Any], bool]:
    results, met = {}, True
    for name, (make, bar) in CASES.items():
        step, batch = captured(make)
        floor, case = [], []
        for _ in range(rounds):
            floor.append(sample(lambda: (two(None, None), nothing())))
            case.append(sample(lambda step=step, batch=batch: step(batch, 1)))  # type: ignore[misc]
        own = [c - f for c, f in zip(case, floor, strict=True)]
        median = statistics.median(own)
        verdict = "" if bar is None else f"  {'met' if median <= bar else 'MISSED'}: at most {bar:.0f}"
        print(f"  {name:<32} median {median:6.2f} us  min {min(own):6.2f}  max {max(own):6.2f}{verdict}")
        met &= bar is None or median <= bar
        results[name] = {"floor_us": floor, "case_us": case, "bar_us": bar}
    return results, met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        import cudagraph_cuda

        return cudagraph_cuda.main(arguments.rounds, RECORDS if arguments.record else None, arguments.date)
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    results, met = host(arguments.rounds)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_cudagraph_host.json"
        path.write_text(json.dumps({"machine": facts, "met": met, "results": results}, indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
