"""Several runners on the same work: processes that take turns, and what came of it.

Each case is a process; in each of several *sessions* all processes are started anew, because where memory and code
happen to lie moves times by percents. In a session the cases are timed in turns, odd rounds in reverse order. Before
the first, each trains a few iterations from the same weights, and the weights are compared: nobody is fast by doing
less.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import limits, machine, statistics
from .runners import GET, OWN, load, split_name
from .workloads.named import Workload, find

CHECKED = 12  # iterations after which the weights are compared
# Of the distance that the weights went, how much may separate two runners of one precision: float32 rounds a sum of
# another order by 1e-7 a term, and a dozen steps of a small network amplify that some hundred times.
SAME = 1e-2
TIMEOUT_S = 180.0  # for one answer: an import, a compilation, a round
ROUND_S = 0.25  # of the bare loop
BATCHES = 16  # in memory, used over and over


@dataclass(frozen=True)
class ContestOptions:
    """What is compared, and how long; see ``python -m fastrunner.bench --help``.

    Attributes:
        budget_s: seconds that the rounds may take; their number follows.
    """

    against: tuple[str, ...]
    runner: str = "iter"
    workload: str = "digits-cnn"
    mode: str = "loop"
    device: str = "cpu"
    threads: int = 0
    workers: int = 2
    seed: int = 0
    sessions: int = 6
    rounds: int = 6
    budget_s: float = 400.0
    peers_python: str = ".venv-peers/bin/python"


class Failed(RuntimeError):
    """A case cannot go on; the message is for its row."""


class Process:
    """A worker, and a deadline for each of its answers."""

    def __init__(self, python: str, spec: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self._errors = (folder / "output.txt").open("wb")
        root = str(Path(__file__).resolve().parents[2])
        start = f"import sys; sys.path.append({root!r}); from fastrunner.bench.worker import main; main()"
        self._process = subprocess.Popen(
            [python, "-c", start, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=os.getcwd(),
        )

    def ask(self, do: str, timeout_s: float = TIMEOUT_S, **order: Any) -> dict[str, Any]:
        """Send an order, wait for its answer.

        Raises:
            Failed: it answers with an error, ends, or does not answer in time (then it is ended).
        """
        self.send(do, **order)
        return self.answer(timeout_s)

    def send(self, do: str, **order: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None

    def answer(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        if not select.select([pipe], [], [], timeout_s)[0]:
            self.close()
            raise Failed(f"it hung: no answer in {timeout_s:.0f} s")
        line = pipe.readline()
        if not line:
            raise Failed(self._last_words())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Failed(f"not installed; get it with: {GET}" if found.get("missing") else found["error"])
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = (self.folder / "output.txt").read_text(errors="replace").strip().splitlines()
        return f"it crashed (exit code {code})" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End it, and wait until it has ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was still to be written has no reader
                    pipe.close()


def expand(names: Sequence[str]) -> list[str]:
    """Cases in order, ``name`` or ``name:variant``. fastrunner is always one; ``mmcv`` is as shipped and ``nosleep``.

    Raises:
        ValueError: an unknown runner or variant.
    """
    cases: list[str] = []
    if not any(name.split(":")[0] == "fastrunner" for name in names):
        names = ["fastrunner", *names]
    for full in names:
        name, variant = split_name(full)
        cases.append(name if variant == load(name).VARIANTS[0] else f"{name}:{variant}")
        if full == "mmcv":
            cases.append("mmcv:nosleep")
    return list(dict.fromkeys(cases))


def contest(options: ContestOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as plain types: each case's samples, differences from fastrunner, checks, machine.

    Raises:
        ValueError: an unknown runner.
        WorkloadError: an unknown workload, or one that does not load.
        OSError: the disk is full.
    """
    cases = expand(options.against)
    workload = find(options.workload)
    if options.mode == "system" and workload.make_dataset is None:
        raise ValueError(f"workload {options.workload} has no data set, which --mode system needs; use --mode loop")
    watch = machine.Watch()
    result: dict[str, Any] = {
        "kind": "contest",
        "options": asdict(options),
        "machine": machine.facts(torch.device(options.device)),
    }
    with tempfile.TemporaryDirectory(prefix="fastrunner-bench-") as folder:
        bench = _Contest(options, cases, workload, Path(folder), say)
        bench.run(watch)
        say("what this machine can do at most")
        result |= {"num_parameters": bench.num_parameters, "batch_size": workload.batch_size, **bench.summary()}
        result["limits"] = bench.limits(result)
    result["machine"]["during"] = watch.summary()
    return result


class _Contest:
    def __init__(
        self, options: ContestOptions, cases: list[str], workload: Workload, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.options, self.cases, self.workload, self.folder, self.say = options, cases, workload, folder, say
        self.failed: dict[str, str] = {}
        self.facts: dict[str, dict[str, Any]] = {name: {} for name in cases}
        self.samples: dict[str, list[list[float]]] = {name: [] for name in cases}
        self.account: dict[str, Any] | None = None
        self.plan: dict[str, int] = {}
        self.file = folder / "given.pt"
        torch.manual_seed(options.seed)
        model = workload.make_model()
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        torch.save({"batches": workload.make_batches(BATCHES, options.seed), "state": self.state}, self.file)

    def run(self, watch: machine.Watch) -> None:
        sessions = self.options.sessions
        for session in range(sessions):
            self.say(f"session {session + 1} of {sessions}: starting {len(self.alive())} processes")
            processes = self._start(session)
            try:
                if session == 0:
                    self._check(processes)
                    self._calibrate(processes)
                self._rounds(session, processes, watch)
                if session == 0:
                    self._account(processes)
            finally:
                for process in processes.values():
                    process.close()

    def alive(self) -> list[str]:
        return [name for name in self.cases if name not in self.failed]

    def _start(self, session: int) -> dict[str, Process]:
        options, started = self.options, {}
        for full in self.alive():
            name, variant = split_name(full)
            folder = self.folder / f"{session}-{full.replace(':', '-')}"
            folder.mkdir()
            spec = {
                "name": name,
                "variant": variant,
                "file": str(self.file),
                "folder": str(folder),
                "max_norm": self.workload.max_norm,
                "optimizer": dict(self.workload.optimizer),
                "threads": options.threads or machine.usable_cores(),
                "batch_size": self.workload.batch_size,
                **{key: getattr(options, key) for key in ("runner", "workload", "device", "mode", "workers", "seed")},
            }
            python = sys.executable
            if name not in OWN and Path(options.peers_python).is_file():
                python = os.path.abspath(options.peers_python)
            started[full] = Process(python, spec, folder)
            self._try(full, started, lambda process: process.send("hello"))
        for full in list(started):
            found = self._try(full, started, lambda process: process.answer())
            if found is not None:
                self.facts[full] |= found
        return started

    def _try(self, full: str, processes: dict[str, Process], ask: Callable[[Process], Any]) -> Any:
        """What ``ask`` gives; None where the case fails, which ends its process, and is its row's text."""
        try:
            return ask(processes[full])
        except Failed as error:
            self.failed[full] = str(error)
            processes.pop(full).close()
            return None

    def _check(self, processes: dict[str, Process]) -> None:
        """Train a few iterations, compare the weights with those of the bare loop, or else of the first case."""
        weights = {}
        for full in list(processes):
            self.say(f"comparing weights: {full}")
            found = self._try(full, processes, lambda process: process.ask("check", iterations=CHECKED))
            if found is not None:
                weights[full] = torch.load(found.pop("weights"), weights_only=True)
                self.facts[full] |= found
        reference: dict[str, Any] = weights.get("raw") or next(iter(weights.values()), {})
        for full, state in weights.items():
            off = distance(state, reference, self.state)
            self.facts[full]["weights_off"] = off
            if not off <= SAME:  # also catches NaN
                self.failed[full] = f"its weights are {off:.0%} off after {CHECKED} iterations: not the same work"
                processes.pop(full).close()

    def _calibrate(self, processes: dict[str, Process]) -> None:
        """How many iterations a round has, and how many rounds there are, from the bare loop's time."""
        reference = "raw" if "raw" in processes else next(iter(processes), None)
        if reference is None:
            return
        few = {"num_iters": 3, "lead": 2, "log_interval": 3}
        found = [self._try(reference, processes, lambda p: p.ask("round", **few)) for _ in range(3)]
        if None in found:
            return
        ns = min(sample["ns"] for sample in found)
        num_iters = max(2, min(2000, round(ROUND_S * 1e9 / ns)))
        if num_iters >= 50:
            num_iters = num_iters // 50 * 50
        lead = max(1, min(20, num_iters // 4))
        round_s = 1.5 * (num_iters + lead) * ns / 1e9  # the others need more than the bare loop
        each = self.options.budget_s / (len(processes) * self.options.sessions)
        rounds = max(2, min(self.options.rounds, int(each / round_s)))
        self.plan = {"num_iters": num_iters, "lead": lead, "log_interval": min(50, num_iters), "rounds": rounds}

    def _rounds(self, session: int, processes: dict[str, Process], watch: machine.Watch) -> None:
        plan = dict(self.plan)
        rounds = plan.pop("rounds", 0)
        for full in list(processes):  # the first round of a process warms up
            self._try(full, processes, lambda process: process.ask("round", **plan))
            self.samples[full].append([])
        for number in range(rounds):
            self.say(f"session {session + 1} of {self.options.sessions}: round {number + 1} of {rounds}")
            names = list(processes)
            for full in reversed(names) if number % 2 else names:
                with watch.sample() as seen:
                    found = self._try(full, processes, lambda process: process.ask("round", **plan))
                    if found is not None:
                        seen.own_cpu_s = found["cpu_s"]
                        self.samples[full][-1].append(found["ns"])

    def _account(self, processes: dict[str, Process]) -> None:
        full = next((name for name in processes if name.startswith("fastrunner")), None)
        if full is None or not self.plan:
            return
        self.say("where fastrunner's iterations go")
        num_iters = max(20, min(400, self.plan["num_iters"]))
        interval = max(1, min(50, num_iters // 5))
        self.account = self._try(
            full, processes, lambda process: process.ask("account", num_iters=num_iters, log_interval=interval)
        )

    def limits(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """What the machine can do and an iteration needs; each case's share of that, fastrunner's bottleneck."""
        if result["base"] is None:
            return None
        device = torch.device(self.options.device)
        machine_limits = limits.measure_limits(device, self.options.threads)
        torch.manual_seed(self.options.seed)
        batch = self.workload.make_batches(1, self.options.seed)[0]
        need = limits.needs(self.workload.make_model(), batch, self.workload.optimizer)
        for case in result["cases"].values():
            if "median_ns" in case:
                case["limit_share"] = sum(limits.limit_s(machine_limits, need).values()) / (case["median_ns"] / 1e9)
        parts = {part: sum(ns) / max(1, len(ns)) for part, ns in (self.account or {"parts": {}})["parts"].items()}
        seconds = result["cases"][result["base"]]["median_ns"] / 1e9
        return {"machine": machine_limits, "need": need, **limits.diagnose(machine_limits, need, seconds, parts)}

    def summary(self) -> dict[str, Any]:
        whole = {name: self.samples[name] for name in self.alive() if self.samples[name]}
        base = next((name for name in whole if name.startswith("fastrunner")), None)
        rows = {}
        for name in self.cases:
            rows[name] = {**self.facts[name], "failed": self.failed.get(name), "samples_ns": self.samples[name]}
            if name in whole:
                rows[name]["median_ns"] = statistics.middle(whole[name])
                rows[name]["min_ns"] = min(map(min, whole[name]))
            if name in whole and base is not None and name != base:
                rows[name]["change"] = statistics.change(whole[name], whole[base]).summary()
        first, sentence = statistics.winner(whole) if whole else (None, "nothing could be measured")
        return {
            "base": base,
            "cases": rows,
            "winner": first,
            "sentence": sentence,
            "plan": self.plan,
            "account": self.account,
        }


def distance(state: dict[str, Any], reference: dict[str, Any], start: dict[str, Any]) -> float:
    """How far two runs' weights are apart, as a share of the way that the reference went from the start.

    ||w - w_ref|| / ||w_ref - w_0||        over all floating-point entries, in float64
    """
    apart = went = 0.0
    for name, value in reference.items():
        if value.is_floating_point():
            apart += float((state[name].double() - value.double()).square().sum())
            went += float((value.double() - start[name].double()).square().sum())
    return float((apart / went) ** 0.5) if went else float("inf") if apart else 0.0


__all__ = ["ContestOptions", "Failed", "Process", "contest", "distance", "expand"]
