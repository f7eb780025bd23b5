"""Which runner is first on the same work, and does fastrunner with MMCV's own step cost more than a loop by hand?

Cases: fastrunner with ``step`` auto, eager and graph.
Floor: ``raw``, the loop that a careful person writes by hand, with torch's fused optimizer.
Peers: mmcv 1.7.2 (as shipped, and without its sleeps), mmengine, ignite, accelerate, lightning, from ``make peers``.
Workloads: those that are named on the command line; by default all of README's table.
Bars: fastrunner:auto is faster than each peer beyond the interval; where an iteration is arithmetic above all, and the
precision is the same, not slower. fastrunner:eager is slower than the loop by hand by at most 1 % or 2 us, whichever is
larger (the interval's lower bound).
Gate: tests/bench must be green first; all weights are compared before anything is timed.

    python benchmarks/bench_runners.py --record

takes as many times ``--budget`` seconds as there are workloads, writes a record of each, and README's table from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))
import table

from fastrunner.bench.cases import parse
from fastrunner.bench.contest import ContestOptions, contest
from fastrunner.bench.contest_main import missing, watched
from fastrunner.bench.contest_report import render

RECORDS = Path(__file__).resolve().parent / "records"
WORKLOADS = ("toy", "mlp", "digits-cnn", "gpt-nano")
AGAINST = "fastrunner:auto,fastrunner:eager,fastrunner:graph,raw,mmcv,mmengine,ignite,accelerate,lightning"
MORE, MORE_NS = 0.01, 2000.0  # that eager may take over the loop by hand


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a comparison is held to: what, met, and the numbers in words."""
    found = []
    arithmetic = (result["limits"] or {}).get("bottleneck") == "arithmetic"
    for name, case in result["cases"].items():
        if parse(name).name == "fastrunner" or "change" not in case:
            continue
        change = case["change"]
        met = change["verdict"] == "slower" or (arithmetic and change["median"] >= 0)
        words = f"{change['median']:+.1%} [{change['low']:+.1%}, {change['high']:+.1%}]"
        found.append({"bar": f"{name} over {result['base']}", "met": met, "measured": words})
    eager = result["cases"].get("fastrunner:eager", {}).get("over_raw")
    if eager is not None:
        met = eager["low"] <= MORE or eager["low_ns"] <= MORE_NS
        words = (
            f"{eager['median']:+.1%} [{eager['low']:+.1%}, {eager['high']:+.1%}], {eager['median_ns'] / 1e3:+.2f} us"
        )
        found.append({"bar": "fastrunner:eager over raw", "met": met, "measured": words})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help="default: %(default)s")
    parser.add_argument("--against", default=AGAINST, help="default: %(default)s")
    parser.add_argument("--runner", choices=("iter", "epoch"), default="iter")
    parser.add_argument("--mode", choices=("loop", "system"), default="loop")
    parser.add_argument("--budget", type=float, default=170.0, help="seconds for each workload (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: one a core (default)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/ and README's table")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the records' names (default: today)")
    arguments = parser.parse_args()
    met, paths = True, []
    for workload in arguments.workloads:
        options = ContestOptions(
            tuple(arguments.against.split(",")),
            workload=workload,
            runner=arguments.runner,
            mode=arguments.mode,
            threads=arguments.threads,
            budget_s=arguments.budget,
        )
        result = watched(lambda say: contest(options, say), Console(stderr=True))  # noqa: B023  # called at once
        render(result, Console())
        result["bars"] = bars(result)
        met &= not missing(result) and all(bar["met"] for bar in result["bars"])
        for bar in result["bars"]:
            print(f"{'met' if bar['met'] else 'MISSED'}: {workload}: {bar['bar']}: {bar['measured']}")
        print(f"{result['seconds']['all']:.0f} s")
        if arguments.record:
            RECORDS.mkdir(exist_ok=True)
            mode = "" if arguments.mode == "loop" else f"_{arguments.mode}"
            paths.append(RECORDS / f"{arguments.date}_runners_{workload}{mode}.json")
            paths[-1].write_text(json.dumps(result) + "\n")
            print(f"recorded in {paths[-1]}")
    if arguments.record and arguments.mode == "loop":
        table.main([str(path) for path in table.newest(RECORDS)])
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
