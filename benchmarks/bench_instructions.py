"""How many instructions does the runner add to an iteration whose step does nothing?

Counted by `valgrind --tool=callgrind` over whole processes: a loop of 200 and one of 1,200 iterations differ by 1,000
iterations and nothing else. Unlike times, counts do not move with the machine's load; they do with Python's and torch's
versions, so a record says which they were.
Floor: a bare loop with the same calls. Cases: both runners with the default hooks, between due points.
Gate: tests/plan/test_cost.py must be green first. Takes some minutes; valgrind runs torch's import 20 times slower.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECORDS = Path(__file__).resolve().parent / "records"
CASES = ("bare", "iter", "epoch")
SHORT, LONG = 200, 1200


def loop(case: str, num_iters: int) -> None:
    """The process that is counted."""
    import torch

    from fastrunner.bench.tax import MAX_NORM, NEVER, NoopModel, NoopOptimizer, _nothing_due
    from fastrunner.bench.training import Plan, make_runner
    from fastrunner.runner import garbage

    garbage.WARM_UP_S = float(
        "inf"
    )  # once a run the heap is frozen: under valgrind in the long loop and not in the short
    torch.set_num_threads(1)
    model = NoopModel()
    optimizer = NoopOptimizer(model.parameters(), lr=0.1)
    batches = [{}] * num_iters
    if case == "bare":
        model.train()
        for batch in batches:
            outputs = model.train_step(batch, optimizer)
            optimizer.zero_grad()
            outputs["loss"].backward()
            optimizer.clipped_step(MAX_NORM)
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(case, num_iters=num_iters, epoch_length=num_iters, log_interval=NEVER)
        logger = logging.Logger("quiet", logging.CRITICAL)
        runner = make_runner(plan, model, optimizer, Path(folder), logger, **_nothing_due())
        runner.run([batches], [("train", 1)])


def count(case: str, num_iters: int) -> int:
    """Instructions of the whole process."""
    command = [
        *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable),
        *(__file__, "--loop", case, str(num_iters)),
    ]
    # A fixed hash seed: the order of sets is part of what is counted. valgrind knows no AVX-512.
    environment = os.environ | {
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "FASTRUNNER_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"callgrind failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return int(found[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", nargs=2, metavar=("CASE", "ITERS"), help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="write the counts to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    if arguments.loop:
        loop(arguments.loop[0], int(arguments.loop[1]))
        return 0
    if shutil.which("valgrind") is None:
        print("valgrind not found: install it (Debian: apt install valgrind)")
        return 1
    counts = {}
    for case in CASES:
        counts[case] = (count(case, LONG) - count(case, SHORT)) / (LONG - SHORT)
        print(f"{case:<6} {counts[case]:8,.0f} instructions an iteration", flush=True)
    for case in CASES[1:]:
        print(f"{case} runner: {counts[case] - counts['bare']:+,.0f} over the bare loop")
    if arguments.record:
        from torch import __version__ as torch_version

        path = RECORDS / f"{arguments.date}_instructions.json"
        facts = dict(python=sys.version.split()[0], torch=torch_version)
        path.write_text(json.dumps(dict(**facts, per_iteration=counts), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
