"""One run of the bench from options to a result that can be printed and written as JSON."""

from __future__ import annotations

import copy
import gc
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model import supervised
from ..optim import build_optimizer
from .machine import facts
from .tax import noop_tax, step_tax
from .training import OPTIMIZER, Plan, evaluate, split, train
from .workloads import DATA, MODELS, make_loader
from .workloads.models import Network


class OptionError(ValueError):
    """Options that do not go together, found only when the data was open."""


@dataclass(frozen=True)
class Options:
    """What the command line says; see ``python -m fastrunner.bench --help``."""

    runner: str = "iter"
    model: str = "cnn"
    data: str = "photos"
    loader: str = "dali"
    batch_size: int = 32
    workers: int = 2
    num_warm_iter: int = 20
    num_bench_iter: int = 300
    device: str = "cpu"
    amp_dtype: str = "float32"
    channels_last: bool = False
    step: str = "fused"
    seed: int = 0
    work_dir: str | None = None
    tax: bool = True
    explain: bool = False


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, evaluate, split, tax.

    Args:
        say: told what is going on, for a progress line.
    Returns:
        A dict of plain types, every sample included.
    Raises:
        ImportError: an extra is missing, the message names it.
        OSError: the cache folder or the work_dir cannot be written.
        OptionError: a batch is larger than the data set.
    """
    begin = perf_counter()
    device = torch.device(options.device)
    machine = facts(device)  # first: what follows raises the load itself
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    say("opening the data")
    train_set, val_set = DATA[options.data].open("train"), DATA[options.data].open("val")
    if options.batch_size > len(train_set):
        raise OptionError(f"--batch-size {options.batch_size} is more than the {len(train_set)} samples to train on")

    seed_everything(options.seed)
    model = make_model(options, len(train_set.CLASSES)).to(device)
    seconds: dict[str, float] = {}
    with _folder(options.work_dir) as folder, _logger(folder) as logger:
        loader = _loader(options, train_set, train=True)
        warm = options.num_warm_iter
        # Both runners close the window with one more iteration.
        plan = Plan.make(options.runner, warm + options.num_bench_iter + 1, len(loader), options.step)
        seconds["data"] = perf_counter() - begin
        result: dict[str, Any] = {
            "options": asdict(options),
            "machine": machine,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "seconds": seconds,
        }
        with _timed(seconds, "training"):
            say(f"training for {plan.num_iters} iterations")
            result["training"] = train(
                plan, model, loader, folder / "train", logger, warm, synchronize, explain=options.explain
            )
        with _timed(seconds, "validation"):
            say("validating")
            val_loader = _loader(options, val_set, train=False)
            result["val"] = evaluate(model, val_loader) | {"chance": 1 / len(val_set.CLASSES)}
            close(val_loader)
        with _timed(seconds, "split"):
            say("training again, with clocks between the hooks")
            fewer = Plan.make(options.runner, warm + math.ceil(options.num_bench_iter / 4) + 1, len(loader))
            result["split"] = split(fewer, model, loader, folder / "split", logger, warm, synchronize)
        if options.tax:
            with _timed(seconds, "tax"):
                say("measuring the runner tax")
                batches = list(islice(loader, 8))
                close(loader)  # its threads would disturb
                median_ns = result["training"]["iter"]["median_ns"]
                result["tax"] = _taxes(options, model, batches, median_ns, folder / "tax", logger, synchronize)
        close(loader)
    seconds["all"] = perf_counter() - begin
    return result


def _taxes(
    options: Options,
    model: Any,
    batches: list[Any],
    iter_ns: float,
    folder: Path,
    logger: logging.Logger,
    synchronize: Callable[[], None] | None,
) -> dict[str, Any]:
    num_iters = max(2, min(500, round(0.3e9 / iter_ns)))  # a side of a round lasts 0.3 s, if the step lets it
    model = copy.deepcopy(model)
    return {
        "step": step_tax(
            options.runner,
            model,
            build_optimizer(model, OPTIMIZER),
            batches,
            num_iters=num_iters,
            rounds=9,
            work_dir=folder,
            logger=logger,
            synchronize=synchronize,
        ),
        # 200 iterations: the log buffer is not yet so full that it settles by itself, so that really nothing is due.
        "noop": noop_tax(options.runner, num_iters=200, rounds=31, work_dir=folder, logger=logger),
        "noop_logging": noop_tax(
            options.runner, num_iters=1000, rounds=15, work_dir=folder, logger=logger, log_interval=50
        ),
    }


def make_model(options: Options, num_classes: int) -> Any:
    """The model, with MMCV's ``train_step``."""
    data = DATA[options.data]
    network = Network(
        MODELS[options.model](data.channels, data.size, num_classes),
        channels_last=options.channels_last,
        amp_dtype=getattr(torch, options.amp_dtype),
    )
    return supervised(network, nn.CrossEntropyLoss())


def _loader(options: Options, dataset: Any, *, train: bool) -> Any:
    return make_loader(
        dataset,
        options.loader,
        batch_size=options.batch_size if train else max(options.batch_size, 64),
        num_workers=options.workers,
        train=train,
        seed=options.seed,
    )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def close(loader: Any) -> None:
    """End the threads of a loader that has some. (torch's DataLoader ends its workers when it is collected.)"""
    if hasattr(loader, "close"):
        loader.close()
    gc.collect()


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = perf_counter()
    yield
    seconds[phase] = perf_counter() - begin


@contextmanager
def _folder(work_dir: str | None) -> Iterator[Path]:
    if work_dir is not None:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        yield Path(work_dir).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="fastrunner-bench-") as folder:
        yield Path(folder)


@contextmanager
def _logger(folder: Path) -> Iterator[logging.Logger]:
    """A logger as a run has, without the console: a report is to come, and a terminal's speed is not to be measured."""
    logger = logging.Logger("fastrunner.bench", logging.INFO)
    handler = logging.FileHandler(folder / "bench.log")
    handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        handler.close()
