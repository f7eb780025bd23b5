"""Several runners on the same work: processes that take turns, and what came of it.

Each case is a process; in each of several *sessions* all processes are started anew, because where memory and code
happen to lie moves times by percents. In a session the cases are timed in turns, odd rounds in reverse order. Before
the first, each trains a few iterations from the same weights, and the weights are compared: nobody is fast by doing
less.

Everything together keeps to a budget: how many sessions and rounds there are follows from what the first iterations
took. A case that crashes or hangs has a row that says so, and costs the others nothing but the wait.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from . import limits, machine, schedule, statistics
from .cases import Case, base_of, expand, parse
from .process import Failed, Process
from .runners import OWN
from .workloads.named import Workload, find

CHECKED = 6  # iterations after which the weights are compared
# Of the distance that the weights went, how much may separate two runners of one precision. float32 rounds a sum of
# another order by 1e-7 a term, which a few steps of a network with batch norm amplify some ten thousand times; bfloat16
# rounds by 2e-3, and a compiled step keeps in float32 what an eager one rounds. One update less of six is 17 %.
SAME = {"float32": 1e-2, "bf16": 1e-1}
START_S = 120.0  # for a process to import what it needs, also where all of them do so at once
SETTLE_S = 240.0  # for a recipe to compile
TIMEOUT_S = 60.0  # for any other answer, and for each of its iterations
PATIENCE = 20  # times what one takes here, where all is well
BATCHES = 16  # in memory, used over and over


@dataclass(frozen=True)
class ContestOptions:
    """What is compared, and how long; see ``python -m fastrunner.bench --help``.

    Attributes:
        options: what is behind each row's name, e.g. ``"+bf16"``.
        sessions, rounds: at most.
        budget_s: seconds that everything may take together.
    """

    against: tuple[str, ...]
    runner: str = "iter"
    workload: str = "digits-cnn"
    mode: str = "loop"
    device: str = "cpu"
    options: str = ""
    threads: int = 0
    workers: int = 2
    seed: int = 0
    sessions: int = 6
    rounds: int = 6
    budget_s: float = 540.0
    peers_python: str = ".venv-peers/bin/python"


def contest(options: ContestOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as plain types: each case's samples, differences from fastrunner, checks, machine.

    Raises:
        ValueError: an unknown runner.
        WorkloadError: an unknown workload, or one that does not load.
        OSError: the disk is full.
    """
    until = monotonic() + options.budget_s
    cases = expand(options.against, options.options)
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
        bench = _Contest(options, cases, workload, Path(folder), say, until)
        bench.run(watch)
        say("what this machine can do at most")
        result |= {"num_parameters": bench.num_parameters, "batch_size": workload.batch_size, **bench.summary()}
        with bench.clock("limits"):
            result["limits"] = bench.limits(result)
    result["machine"]["during"] = watch.summary()
    result["seconds"] = {**bench.seconds, "all": options.budget_s - (until - monotonic())}
    return result


class _Contest:
    def __init__(
        self,
        options: ContestOptions,
        cases: list[str],
        workload: Workload,
        folder: Path,
        say: Callable[[str], None],
        until: float,
    ) -> None:
        self.options, self.cases, self.workload, self.folder = options, cases, workload, folder
        self.say, self.until = say, until
        self.failed: dict[str, str] = {}
        self.facts: dict[str, dict[str, Any]] = {name: {} for name in cases}
        self.samples: dict[str, list[list[float]]] = {name: [] for name in cases}
        self.account: dict[str, Any] | None = None
        self.plan: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.file = folder / "given.pt"
        torch.set_num_threads(options.threads or machine.usable_cores())
        torch.manual_seed(options.seed)
        model = workload.make_model()
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        batches = workload.make_batches(BATCHES, options.seed)
        self.need = limits.needs(model, batches[0], workload.optimizer)
        begin = monotonic()
        model.train_step(batches[0], None)["loss"].backward()  # type: ignore[operator]
        self.patience_s = PATIENCE * (monotonic() - begin)
        save({"batches": batches, "state": self.state}, self.file)

    def run(self, watch: machine.Watch) -> None:
        session, sessions = 0, self.options.sessions
        while session < sessions:
            begin = monotonic()
            self.say(f"session {session + 1} of {sessions}: starting {len(self.alive())} processes")
            with self.clock("starting"):
                processes = self._start(session)
            try:
                with self.clock("compiling"):
                    self._settle(processes)
                started_s = monotonic() - begin
                if session == 0:
                    with self.clock("checking"):
                        self._check(processes)
                        self._plan(processes, started_s)
                    sessions = self.plan.get("sessions", 1)
                with self.clock("rounds"):
                    self._rounds(session, sessions, processes, watch)
                if session == 0:
                    with self.clock("account"):
                        self._account(processes)
            finally:
                with self.clock("ending"):
                    for process in processes.values():
                        process.dismiss()
                    for process in processes.values():
                        process.close()
            session += 1
            if self.until - monotonic() < self.plan.get("session_s", 0.0):
                break  # the machine is slower than it was, or a case has hung
        self.plan["sessions"] = session

    def most_s(self, num_iters: int) -> float:
        """How long an answer may take that needs that many iterations."""
        return TIMEOUT_S + num_iters * self.patience_s

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Adds to the seconds of a phase."""
        begin = monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + monotonic() - begin

    def alive(self) -> list[str]:
        return [name for name in self.cases if name not in self.failed]

    def _start(self, session: int) -> dict[str, Process]:
        options, started = self.options, dict[str, Process]()
        for full in self.alive():
            case = parse(full)
            folder = self.folder / f"{session}-{full.replace(':', '-')}"
            folder.mkdir()
            spec = make_spec(case, options, self.workload, self.file, folder)
            python = sys.executable
            if case.name not in OWN and Path(options.peers_python).is_file():
                python = os.path.abspath(options.peers_python)
            started[full] = Process(python, spec, folder)
            self._try(full, started, lambda process: process.send("hello"))
        for full in list(started):
            found = self._try(full, started, lambda process: process.answer(START_S))
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

    def _settle(self, processes: dict[str, Process]) -> None:
        """Let recipes that compile do so before anything is timed."""
        self.say("waiting for what compiles")
        most = min(SETTLE_S, self.options.budget_s / 2)
        for full in list(processes):
            self._try(full, processes, lambda process: process.send("settle", most_s=most))
        for full in list(processes):  # at once: nothing is timed here
            found = self._try(full, processes, lambda process: process.answer(most + self.most_s(2 * BATCHES)))
            if found is not None:
                self.facts[full] |= found

    def _check(self, processes: dict[str, Process]) -> None:
        """Train a few iterations, compare the weights with those of the bare loop, or else of the first case."""
        weights = dict[str, Any]()
        for full in list(processes):
            self.say(f"comparing weights: {full}")
            most = self.most_s(CHECKED)
            found = self._try(full, processes, lambda process: process.ask("check", most, iterations=CHECKED))  # noqa: B023
            if found is not None:
                weights[full] = torch.load(found.pop("weights"), weights_only=True)
                self.facts[full] |= found
        for full, state in weights.items():
            precision = parse(full).precision
            alike = [name for name in weights if parse(name).precision == precision]
            reference = next((name for name in alike if parse(name).name == "raw"), alike[0])
            off = distance(state, weights[reference], self.state)
            self.facts[full]["weights_off"] = off
            if not off <= SAME[precision]:  # also catches NaN
                self.failed[full] = f"its weights are {off:.0%} off after {CHECKED} iterations: not the same work"
                processes.pop(full).close()

    def _plan(self, processes: dict[str, Process], started_s: float) -> None:
        """How many iterations a round of each case has, and how many rounds and sessions there are."""
        took: dict[str, float] = {}
        for full in list(processes):
            self.say(f"how long is an iteration: {full}")
            for num_iters in schedule.PROBES:
                order = {"num_iters": num_iters, "lead": 1, "log_interval": num_iters}
                most = self.most_s(num_iters + 2)
                found = self._try(full, processes, lambda process: process.ask("round", most, **order))  # noqa: B023
                if found is None:
                    took.pop(full, None)
                    break
                took[full] = found["ns"] / 1e9
                if took[full] > schedule.SLOW_S:
                    break
        if took:
            reserve = schedule.RESERVE_S + schedule.account_s(max(took.values()))
            left = self.until - monotonic() - reserve
            self.plan = schedule.make(took, started_s, left, self.options.sessions, self.options.rounds)

    def _rounds(self, session: int, sessions: int, processes: dict[str, Process], watch: machine.Watch) -> None:
        rounds = self.plan.get("rounds", 0)
        for full in list(processes):  # the first round of a process warms up
            self._try(full, processes, lambda process: self._round(full, process))  # noqa: B023
            self.samples[full].append([])
        for number in range(rounds):
            self.say(f"session {session + 1} of {sessions}: round {number + 1} of {rounds}")
            names = list(processes)
            for full in reversed(names) if number % 2 else names:
                with watch.sample() as seen:
                    found = self._try(full, processes, lambda process: self._round(full, process))  # noqa: B023
                    if found is not None:
                        seen.own_cpu_s = found["cpu_s"]
                        self.samples[full][-1].append(found["ns"])

    def _round(self, full: str, process: Process) -> dict[str, Any]:
        order = self.plan["rounds_of"][full]
        return process.ask("round", self.most_s(order["num_iters"] + order["lead"] + 1), **order)

    def _account(self, processes: dict[str, Process]) -> None:
        full = base_of(self.cases[0], list(processes))
        if full is None or not self.plan:
            return
        self.say("where fastrunner's iterations go")
        num_iters = schedule.account_iters(min(map(min, self.samples[full])) / 1e9)
        interval = max(1, min(50, num_iters // 5))
        self.account = self._try(
            full,
            processes,
            lambda process: process.ask(
                "account", self.most_s(2 * num_iters), num_iters=num_iters, log_interval=interval
            ),
        )

    def limits(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """What the machine can do and an iteration needs; each case's share of that, fastrunner's bottleneck."""
        if result["base"] is None:
            return None
        device = torch.device(self.options.device)
        machine_limits = limits.measure_limits(device, self.options.threads)
        need = self.need
        for name, case in result["cases"].items():
            if "median_ns" in case:
                seconds, least = case["median_ns"] / 1e9, limits.limit_s(machine_limits, need, dtype_of(name))
                case["limit_share"] = sum(least.values()) / seconds
                case["mfu"] = least["arithmetic"] / seconds
        parts = {part: sum(ns) / max(1, len(ns)) for part, ns in (self.account or {"parts": {}})["parts"].items()}
        seconds = result["cases"][result["base"]]["median_ns"] / 1e9
        base = result["base"]
        whole = self.facts[base].get("whole", False)
        found = limits.diagnose(machine_limits, need, seconds, parts, dtype_of(base), whole)
        return {"machine": machine_limits, "need": need, **found}

    def summary(self) -> dict[str, Any]:
        """The rows with what is known of them, and who is first."""
        whole = {name: self.samples[name] for name in self.alive() if self.samples[name] and self.samples[name][0]}
        found = judge(whole)
        rows = {
            name: {
                **self.facts[name],
                "failed": self.failed.get(name),
                "samples_ns": self.samples[name],
                **found["rows"].get(name, {}),
            }
            for name in self.cases
        }
        return {
            "base": base_of(self.cases[0], list(whole)),
            "cases": rows,
            "winners": found["winners"],
            "sentence": found["sentence"],
            "plan": self.plan,
            "account": self.account,
        }


def make_spec(case: Case, options: ContestOptions, workload: Workload, file: Path, folder: Path) -> dict[str, Any]:
    """What a case's process is told: see ``worker.Worker``."""
    return {
        "name": case.name,
        "variant": case.variant,
        "amp": None if case.precision == "float32" else case.precision,
        "channels_last": case.channels_last,
        "file": str(file),
        "folder": str(folder),
        "max_norm": workload.max_norm,
        "optimizer": dict(workload.optimizer),
        "threads": options.threads or machine.usable_cores(),
        "batch_size": workload.batch_size,
        **{key: getattr(options, key) for key in ("runner", "workload", "device", "mode", "workers", "seed")},
    }


def judge(whole: Mapping[str, statistics.Samples]) -> dict[str, Any]:
    """Medians and differences of rows, and who is first among the rows of one precision.

    fastrunner competes once, as its first row: its other recipes are no peers of it.

    Returns:
        rows: name -> median_ns, min_ns, change (from fastrunner's first row), over_raw (from the bare loop's).
        winners: the first of each precision, where there is one; sentence: the same in words.
    """
    rows: dict[str, dict[str, Any]] = {}
    sentences, winners = dict[str, str](), []
    for precision in dict.fromkeys(parse(name).precision for name in whole):
        alike = {name: samples for name, samples in whole.items() if parse(name).precision == precision}
        base = base_of(next(iter(alike)), list(alike))
        bare = next((name for name in alike if parse(name).name == "raw"), None)
        for name, samples in alike.items():
            rows[name] = {"median_ns": statistics.middle(samples), "min_ns": min(map(min, samples))}
            for key, other in (("change", base), ("over_raw", bare)):
                if other not in (None, name):
                    rows[name][key] = statistics.change(samples, whole[str(other)]).summary()
        first, sentences[precision] = statistics.winner(
            {name: samples for name, samples in alike.items() if name == base or parse(name).name != "fastrunner"}
        )
        winners += [first] if first is not None else []
    texts = [text if len(sentences) == 1 else f"{precision}: {text}" for precision, text in sentences.items()]
    return {"rows": rows, "winners": winners, "sentence": "; ".join(texts) or "nothing could be measured"}


def save(given: dict[str, Any], file: Path) -> None:
    """What all processes read.

    Raises:
        OSError: the disk is full.
    """
    try:
        torch.save(given, file)
    except RuntimeError as error:  # torch's word for it
        raise OSError(f"cannot write {file}: {str(error).splitlines()[0]}") from error


def dtype_of(name: str) -> str:
    """The type in which a row multiplies."""
    return {"float32": "float32", "bf16": "bfloat16"}[parse(name).precision]


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


__all__ = ["ContestOptions", "contest", "distance", "judge", "make_spec"]
