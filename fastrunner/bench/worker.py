"""One runner in a process of its own, which does what it is told: a line of JSON in, a line of JSON out.

    {"do": "settle", "most_s": 240}                  -> train until nothing is being compiled any more
    {"do": "check", "iterations": 6}                 -> train from the first weights; the weights afterwards, the sleeps
    {"do": "round", "num_iters": 500, ...}           -> nanoseconds an iteration
    {"do": "account", ...}                           -> where fastrunner's iterations go, one by one

Everything that the runner prints goes to a file; only answers go to the pipe. The process needs torch and the runner's
package; batches and first weights come in a file, so that all runners get the same bytes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

from .measure import Window
from .runners import Task, load

CHECK_EPOCHS = 3
NEVER = 10**9  # a log interval without logs
AMP = {"bf16": torch.bfloat16}


class Sleeps:
    """Counts what the loop's thread sleeps, and sleeps it, or not: rounds do without, their clock stands meanwhile.

    Args:
        skip: return at once.
    """

    def __init__(self, skip: bool) -> None:
        self.skip, self.taken = skip, list[tuple[int, float]]()  # (when it began, seconds asked for)
        self._sleep, self._thread = time.sleep, threading.current_thread()
        time.sleep = self  # type: ignore[assignment]

    def __call__(self, seconds: float) -> None:
        if threading.current_thread() is not self._thread:
            self._sleep(seconds)
            return
        self.taken.append((perf_counter_ns(), seconds))
        if not self.skip:
            self._sleep(seconds)

    def between(self, begin: int, end: int) -> float:
        """Seconds of the sleeps that began in a stretch of ``perf_counter_ns``."""
        return sum(seconds for at, seconds in self.taken if begin <= at < end)


class Passes:
    """A loader that is gone through several times, ``length`` batches each, with the clock of :class:`Window`.

    Args:
        lead, num_iters: batches that are not timed, at the start, and those that are.
    """

    def __init__(self, loader: Any, length: int, lead: int, num_iters: int) -> None:
        self._loader, self._length = loader, length
        self._first, self._last = lead, lead + num_iters
        self.num_iters = num_iters
        self._asked = 0
        self.begin = self.end = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        for _ in range(self._length):
            if self._asked == self._first:
                self.begin = perf_counter_ns()
            if self._asked == self._last:
                self.end = perf_counter_ns()
            self._asked += 1
            yield next(batches)


class Worker:
    """A runner, its model and its optimizer, kept from one round to the next.

    Args:
        spec: what ``contest.py`` sends: name, variant, runner, workload, file (of batches and weights), folder,
            max_norm, optimizer, threads, device, mode, batch_size, workers, seed, amp, channels_last.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        self.spec = spec
        self.module = load(spec["name"])
        self.device = torch.device(spec["device"])
        given = torch.load(spec["file"], weights_only=False)  # written a moment ago by the process that started this
        self.batches = [_to(batch, self.device) for batch in given["batches"]]
        self.workload: Any = None
        self.state = given["state"]
        self.model = self._make_model()
        self.sleeps = Sleeps(skip=spec["variant"] == "nosleep")
        self.optimizer = self._make_optimizer()
        self.loader: Any = None
        self.kept: dict[str, Any] = {}

    def _make_model(self) -> Any:
        from .workloads.named import find

        torch.manual_seed(self.spec["seed"])
        self.workload = find(self.spec["workload"])
        model = self.workload.make_model()
        model.load_state_dict(self.state)
        if self.spec["name"] != "fastrunner":  # which has options for both
            if self.spec["channels_last"]:
                model = model.to(memory_format=torch.channels_last)
            if self.spec["amp"] is not None:
                model.train_step = _autocast(model.train_step, self.device, AMP[self.spec["amp"]])
        return model.to(self.device)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = dict(self.spec["optimizer"])
        kind = getattr(torch.optim, options.pop("type"))
        try:
            return kind(self.model.parameters(), fused=True, **options)  # type: ignore[no-any-return]
        except (TypeError, RuntimeError):  # this optimizer has no fused form
            return kind(self.model.parameters(), **options)  # type: ignore[no-any-return]

    def _task(self, log_interval: int, epochs: int = 1) -> Task:
        return Task(
            runner=self.spec["runner"],
            model=self.model,
            optimizer=self.optimizer,
            max_norm=self.spec["max_norm"],
            log_interval=log_interval,
            folder=Path(self.spec["folder"]),
            variant=self.spec["variant"],
            epochs=epochs,
            amp=self.spec["amp"],
            channels_last=self.spec["channels_last"],
            kept=self.kept,
        )

    def hello(self) -> dict[str, Any]:
        """What this is: for the record."""
        package = self.module.PACKAGE
        version = ""
        if package is not None:
            from importlib import import_module

            if hasattr(self.module, "prepare"):
                self.module.prepare()
            version = str(getattr(import_module(package), "__version__", ""))
        return {
            "torch": torch.__version__,
            "version": version,
            "optimizer": type(self.optimizer).__name__ + (" fused" if self.optimizer.defaults.get("fused") else ""),
            "note": getattr(self.module, "NOTE", ""),
        }

    def settle(self, most_s: float) -> dict[str, Any]:
        """Train until everything that the runner compiles is there, or for that long; then put the weights back."""
        begin = time.perf_counter()
        if not hasattr(self.module, "settle"):
            return {}
        if not self.module.settle(self._task(NEVER), self.batches, most_s):  # it would go on in the rounds
            return {"error": f"its step was still being compiled after {most_s:.0f} s; a larger --budget leaves more"}
        self._restore()
        return {"settle_s": time.perf_counter() - begin, **self.module.explain(self._task(NEVER))}

    def _restore(self) -> None:
        """The first weights, and no momentum, where they are: what is compiled holds their addresses."""
        self.model.load_state_dict(self.state)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def check(self, iterations: int) -> dict[str, Any]:
        """Train from the first weights; then put them back."""
        self.sleeps.skip = self.spec["variant"] == "nosleep"
        self._restore()
        per_epoch = max(1, iterations // CHECK_EPOCHS)
        source = Passes(self.batches[:per_epoch], per_epoch, 0, CHECK_EPOCHS * per_epoch - 1)
        self.module.train(self._task(per_epoch, CHECK_EPOCHS), source)
        end = perf_counter_ns()
        file = Path(self.spec["folder"]) / "weights.pt"
        torch.save({name: value.cpu() for name, value in self.model.state_dict().items()}, file)
        self._restore()
        self.sleeps.skip = True
        return {
            "weights": str(file),
            "iterations": CHECK_EPOCHS * per_epoch,
            "sleep_per_epoch_s": self.sleeps.between(source.begin, source.end) / (CHECK_EPOCHS - 1),
            "sleep_at_end_s": self.sleeps.between(source.end, end),
        }

    def round(self, num_iters: int, lead: int, log_interval: int) -> dict[str, Any]:
        """One sample."""
        gc.collect()
        cpu = time.process_time()
        if self.spec["mode"] == "loop":
            window = Window(self.batches, num_iters, self._synchronize(), lead)
            self.module.train(self._task(log_interval), window)
            return {"ns": window.ns_per_iter, "cpu_s": time.process_time() - cpu}
        loader = self._own_loader()
        length = min(len(loader), lead + num_iters + 1)
        epochs = -(-(lead + num_iters + 1) // length)
        passes = Passes(loader, length, lead, num_iters)
        self.module.train(self._task(log_interval, epochs), passes)
        slept = self.sleeps.between(passes.begin, passes.end)  # not slept, and reported apart, as seconds an epoch
        return {
            "ns": (passes.end - passes.begin) / num_iters,
            "cpu_s": time.process_time() - cpu,
            "slept_s": slept,
        }

    def _synchronize(self) -> Any:
        return torch.cuda.synchronize if self.device.type == "cuda" else None

    def _own_loader(self) -> Any:
        """The best that this runner's own documentation offers; kept over rounds."""
        if self.loader is not None:
            return self.loader
        dataset, spec = self.workload.make_dataset(), self.spec
        if spec["name"] == "fastrunner":
            from .workloads import make_loader

            self.loader = make_loader(
                dataset,
                self.workload.loader,
                batch_size=spec["batch_size"],
                num_workers=spec["workers"],
                train=True,
                seed=spec["seed"],
            )
        else:
            workers = 0 if self.workload.loader == "memory" else spec["workers"]
            self.loader = torch.utils.data.DataLoader(
                dataset,
                batch_size=spec["batch_size"],
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
            )
        return self.loader

    def account(self, num_iters: int, log_interval: int) -> dict[str, Any]:
        """Where the iterations of fastrunner go."""
        from .account import account

        epochs = 4 if self.spec["runner"] == "epoch" else 1  # their ends are to be seen
        length = max(log_interval, num_iters // epochs)
        return account(self._task(log_interval, epochs), list(islice(_around(self.batches), length)))


def _autocast(step: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``train_step`` with its forward pass and loss under autocast, as torch's documentation has it."""

    def train_step(batch: Any, optimizer: Any = None, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype):
            return step(batch, optimizer, **kwargs)

    return train_step


def _around(batches: list[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def _to(batch: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def main() -> None:
    """Answer until the other side closes the pipe. ``argv[1]`` is the spec."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whoever prints, prints to the file that stands for standard error
    warnings.simplefilter("ignore")
    worker: Worker | None = None
    for line in iter(sys.stdin.readline, ""):
        try:
            order = json.loads(line)
            do = order.pop("do")
            if worker is None:
                worker = Worker(json.loads(sys.argv[1]))
            answer = getattr(worker, do)(**order)
        except Exception as error:  # a peer may fail in any way; the others go on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            if isinstance(error, ImportError):
                answer["missing"] = error.name
        answers.write(json.dumps(answer) + "\n")
