"""``python -m fastrunner.verify_resume CONFIG``: is a resumed run of this config the run that was not interrupted?

    whole:    at + more iterations
    stopped:  at iterations, checkpoint, end
    resumed:  everything built anew, other random numbers drawn, resume, more iterations

Compared for each of the last ``more`` iterations, in the order in which a difference would spread: sample ids (where
the loader is one of fastrunner's), the batch, the random generators, the loss, the weights, the optimizer. The first
difference is named. Exit code 0: none; 1: a difference; 2: it could not be tried.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os.path as osp
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config, DictAction
from .data import rng
from .data.loader import EpochLoader, IterLoader
from .environment import set_random_seed
from .hooks.hook import Hook
from .train import Job, build, choose_seed, load_config

KINDS = ("sample ids", "batch", "RNG", "loss", "weights", "optimizer")  # before the iteration: the first three


@dataclass
class Trace:
    """What a run did: iteration (from 0) -> kind -> digest, and the tensors that it ended with."""

    iters: dict[int, dict[str, str]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Watch(Hook):
    """Writes down every iteration, and ends the run after ``stop_at`` of them."""

    def __init__(self, trace: Trace, stop_at: int) -> None:
        self.trace, self.stop_at = trace, stop_at

    def before_train_iter(self, runner: Any) -> None:
        seen = self.trace.iters[runner.iter] = {"batch": digest(runner.data_batch), "RNG": digest(generators())}
        ids = sample_ids(runner)
        if ids is not None:
            seen["sample ids"] = digest(ids)


class Finish(Watch):
    """The same at an iteration's end, behind all other hooks; ``save_to`` is a folder for a checkpoint at the stop."""

    def __init__(self, trace: Trace, stop_at: int, save_to: str | None = None) -> None:
        super().__init__(trace, stop_at)
        self.save_to = save_to

    def before_train_iter(self, runner: Any) -> None:
        pass

    def after_train_iter(self, runner: Any) -> None:
        seen = self.trace.iters[runner.iter]
        seen["loss"] = digest(runner.outputs.get("loss"))
        seen["weights"] = digest(runner.model.state_dict())
        seen["optimizer"] = digest(optimizer_state(runner))
        if runner.iter + 1 == self.stop_at:
            self.trace.tensors = {name: t.detach().clone() for name, t in runner.model.state_dict().items()}
            if self.save_to is not None:
                runner.save_checkpoint(self.save_to, filename_tmpl="verify.pth", create_symlink=False)
            runner.stop(f"verify_resume: {self.stop_at} iterations")


def sample_ids(runner: Any) -> Any:
    """Of the batch in hand; None where the loader is not one of fastrunner's."""
    loader = runner.data_loader
    loader = loader.dataloader if isinstance(loader, IterLoader) else loader
    if not isinstance(loader, EpochLoader) or loader.position == 0:
        return None
    return loader.order.ids(loader.epoch, loader.position - 1)


def generators() -> Any:
    """The states of all random generators."""
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return rng.capture(), gpu


def optimizer_state(runner: Any) -> Any:
    optimizers = runner.optimizer if isinstance(runner.optimizer, dict) else {"": runner.optimizer}
    return {name: optimizer.state_dict() for name, optimizer in optimizers.items()}


def digest(value: Any) -> str:
    """A hash of everything in a nest of containers and objects, bit for bit."""
    found = hashlib.blake2b(digest_size=12)
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            found.update(repr(key).encode())
            _feed(found, value[key])
    elif isinstance(value, (list, tuple, set)):
        found.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _feed(found, item)
    elif isinstance(value, (str, bytes, int, float, complex, bool, type(None), np.generic)):
        found.update(repr(value).encode())
    elif hasattr(value, "data"):  # DataContainer
        _feed(found, value.data)
    else:
        found.update(type(value).__name__.encode())  # an object of the user's: only that it is there


def run(cfg: Config, folder: str, stop_at: int, *, resume: str | None = None, save_to: str | None = None) -> Trace:
    """Build the job of ``cfg`` anew and train it up to ``stop_at`` iterations.

    Raises:
        ValueError: the config's run is shorter.
    """
    trace = Trace()
    set_random_seed(cfg.seed)
    logger = logging.Logger("fastrunner.verify_resume", logging.ERROR)
    job: Job = build(cfg, work_dir=folder, logger=logger, validate=False)
    job.runner.register_hook(Watch(trace, stop_at), priority="HIGHEST")
    job.runner.register_hook(Finish(trace, stop_at, save_to), priority="LOWEST")
    # Once more: modules that are imported while the first job is built may draw (rich does), and only then. What a
    # resume does not restore is not to be right by chance.
    set_random_seed(cfg.seed + (resume is not None))
    if resume is not None:
        job.runner.resume(resume)
    job.run()
    if job.runner.iter < stop_at:
        raise ValueError(
            f"the config's run ends after {job.runner.iter} iterations; --at and --more must add up to no more"
        )
    return trace


def compare(whole: Trace, resumed: Trace, at: int) -> list[str]:
    """What differs, the first thing first; empty where nothing does."""
    if not whole.iters.keys() >= set(range(at, max(whole.iters) + 1)) or min(resumed.iters) != at:
        return [f"the resumed run began with iteration {min(resumed.iters)}, not {at}"]
    lines = []
    for number in range(at, max(whole.iters) + 1):
        one, other = whole.iters[number], resumed.iters.get(number, {})
        different = [kind for kind in KINDS if one.get(kind) != other.get(kind)]
        if different:
            lines.append(f"iteration {number}: {', '.join(different)} differ; the iterations before are equal")
            break
    for name, tensor in whole.tensors.items():
        other_tensor = resumed.tensors.get(name)
        if other_tensor is None or not torch.equal(tensor, other_tensor):
            distance = "" if other_tensor is None else f", by up to {_distance(tensor, other_tensor):.3g}"
            lines.append(f"at the end {name} differs{distance}")
    return lines


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


def verify(cfg: Config, at: int, more: int) -> list[str]:
    """Run all three; what differs, as lines of text."""
    with tempfile.TemporaryDirectory(prefix="fastrunner-verify-") as folder:
        whole = run(cfg, osp.join(folder, "whole"), at + more)
        run(cfg, osp.join(folder, "stopped"), at, save_to=folder)
        resumed = run(cfg, osp.join(folder, "resumed"), at + more, resume=osp.join(folder, "verify.pth"))
    return compare(whole, resumed, at)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {count}")
    return count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m fastrunner.verify_resume",
        description="Compare a run that is stopped and resumed with one that is not.",
    )
    parser.add_argument("config", help="a .py (it is executed), .yaml or .json file, as for fastrunner.train")
    parser.add_argument("--at", type=_count, default=10, help="iterations before the stop (default: 10)")
    parser.add_argument("--more", type=_count, default=10, help="iterations after it (default: 10)")
    parser.add_argument("--seed", type=int, help="default: the config's, else a drawn one")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    try:
        args = parser.parse_args(argv)
        cfg = load_config(args.config, args.cfg_options)
        cfg.seed = choose_seed(args.seed if args.seed is not None else cfg.get("seed"))
        print(f"{args.config}, seed {cfg.seed}: {args.at} + {args.more} iterations, whole and resumed", flush=True)
        lines = verify(cfg, args.at, args.more)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, ImportError, RuntimeError) as error:
        print(f"could not be tried: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if not lines:
        print(f"equal, bit for bit: {', '.join(KINDS)} of all {args.more} iterations, and the final weights")
        return 0
    print("\n".join(lines))
    return 1


if __name__ == "__main__":
    sys.exit(main())
