"""What does an iteration cost in one process, by workload: fastrunner beside the loop written by hand?

Floor: ``raw``, torch's fused optimizer in a loop of ten lines. Peers live in other environments, and noise wants other
means: ``python -m fastrunner.bench --against``. This file is for pytest-benchmark's records, and for comparing them.
Gate: tests/bench/test_contest.py, which compares the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrunner.bench.measure import Window
from fastrunner.bench.runners import Task, load, split_name
from fastrunner.bench.workloads.named import find

ITERATIONS, LEAD = 50, 5


@pytest.mark.parametrize("case", ["raw", "fastrunner:eager", "fastrunner"])
@pytest.mark.parametrize("workload", ["toy", "mlp", "digits-cnn"])
def test_iteration(benchmark: Any, workload: str, case: str, tmp_path: Path) -> None:
    work = find(workload)
    torch.manual_seed(0)
    model, batches = work.make_model(), work.make_batches(16, 0)
    options = dict(work.optimizer)
    optimizer = getattr(torch.optim, options.pop("type"))(model.parameters(), fused=True, **options)
    name, variant = split_name(case)
    task = Task("iter", model, optimizer, work.max_norm, ITERATIONS, tmp_path, variant)
    module = load(name)
    benchmark.group = f"{workload}, {ITERATIONS} iterations"
    benchmark.extra_info["num_iters"] = ITERATIONS
    benchmark.pedantic(
        module.train,
        setup=lambda: ((task, Window(batches, ITERATIONS - LEAD - 1, lead=LEAD)), {}),
        rounds=15,
        warmup_rounds=2,
    )
