"""Does the bench call equal runners equal, and does it find a runner that is 5 % slower?

Cases: the loop of ``raw.py`` on ``mlp``, one thread, in five processes a session that take turns: four that are equal,
and one that trains 5 % more iterations and counts them as if it did not. Six sessions make a comparison, as by default:
two of equal processes, one of the slower one with an equal one.
Bars: "no difference" in at least 19 of 20 comparisons of equal processes; "slower" in at least 9 of 10 of the slower.
Floor: the noise of the machine, which is in the samples. Gate: tests/bench/test_statistics.py, which also judges the
newest record again, so that a change of the statistics is held against real samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastrunner.bench import machine, statistics
from fastrunner.bench.cases import parse
from fastrunner.bench.contest import BATCHES, ContestOptions, make_spec, save
from fastrunner.bench.process import Process
from fastrunner.bench.workloads.named import find

RECORDS = Path(__file__).resolve().parent / "records"
EQUAL, SESSIONS, ROUNDS = 4, 6, 6  # equal processes; sessions and rounds of a comparison
ITERATIONS, MORE = 200, 1.05
LEAST = {"no difference": (19, 20), "slower": (9, 10)}
WAIT_S = 120.0


def session(options: ContestOptions, file: Path, folder: Path, watch: machine.Watch) -> list[list[float]]:
    """Nanoseconds an iteration, [process][round]; the last process is the slower one."""
    workload, processes = find(options.workload), []
    try:
        for number in range(EQUAL + 1):
            (folder / str(number)).mkdir(parents=True)
            spec = make_spec(parse("raw"), options, workload, file, folder / str(number))
            processes.append(Process(sys.executable, spec, folder / str(number)))
            processes[-1].send("hello")
        for process in processes:
            process.answer(WAIT_S)
        samples: list[list[float]] = [[] for _ in processes]
        for turn in range(ROUNDS + 1):  # the first warms up
            order = range(EQUAL + 1)
            for number in reversed(order) if turn % 2 else order:
                factor = MORE if number == EQUAL else 1.0
                with watch.sample() as seen:
                    num_iters = round(ITERATIONS * factor)
                    found = processes[number].ask("round", WAIT_S, num_iters=num_iters, lead=20, log_interval=50)
                    seen.own_cpu_s = found["cpu_s"]
                if turn:
                    samples[number].append(found["ns"] * factor)
        return samples
    finally:
        for process in processes:
            process.dismiss()
        for process in processes:
            process.close()


def verdicts(sessions: list[list[list[float]]]) -> dict[str, list[str]]:
    """Of each comparison, by what it should be. A comparison has SESSIONS sessions that no other one has."""
    found: dict[str, list[str]] = {"no difference": [], "slower": []}
    for first in range(0, len(sessions) - SESSIONS + 1, SESSIONS):
        case = [[each[number] for each in sessions[first : first + SESSIONS]] for number in range(EQUAL + 1)]
        for a, b in ((0, 1), (2, 3)):
            found["no difference"].append(statistics.change(case[a], case[b]).verdict)
        found["slower"].append(statistics.change(case[EQUAL], case[0]).verdict)
    return found


def report(found: dict[str, list[str]]) -> bool:
    met = True
    for wanted, (least, of) in LEAST.items():
        right, number = found[wanted].count(wanted), len(found[wanted])
        held = right * of >= least * number
        met &= held
        others = sorted(set(found[wanted]) - {wanted})
        also = f"; also {', '.join(others)}" if others else ""
        print(f"{'met' if held else 'MISSED'}: {wanted!r} in {right} of {number}, at least {least} of {of}{also}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=10, help="of six sessions; a session takes some 5 s")
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    options, watch = ContestOptions((), workload="mlp", threads=1), machine.Watch()
    workload, facts = find(options.workload), machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    sessions: list[list[list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        file = Path(folder) / "given.pt"
        given: dict[str, Any] = {"state": workload.make_model().state_dict()}
        save({**given, "batches": workload.make_batches(BATCHES, 0)}, file)
        for number in range(arguments.comparisons * SESSIONS):
            sessions.append(session(options, file, Path(folder) / f"session{number}", watch))
    found = verdicts(sessions)
    met = report(found)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_verdicts.json"
        rounded = [[[round(ns) for ns in samples] for samples in each] for each in sessions]
        facts["during"] = watch.summary()
        path.write_text(json.dumps(dict(machine=facts, met=met, verdicts=found, sessions_ns=rounded)) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
