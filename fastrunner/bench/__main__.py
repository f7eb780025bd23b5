"""Train a real model on real data through a runner, and say where the time goes.

python -m fastrunner.bench --runner iter
python -m fastrunner.bench --runner epoch --data digits --results-file out.json
python -m fastrunner.bench compare before.json after.json
python -m fastrunner.bench --runner iter --against raw,mmcv,mmengine,ignite,accelerate,lightning --workload mlp
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console

from ..step.config import RECIPES
from . import compare, contest_main
from .report import render
from .run import OptionError, Options, run
from .training import RUNNERS
from .workloads import DATA, LOADERS, MODELS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastrunner.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runner", choices=RUNNERS, default="iter", help="which runner (default: %(default)s)")
    add("--model", choices=MODELS, default="cnn", help="default: %(default)s")
    add("--data", choices=DATA, default="photos", help="default: %(default)s")
    add("--loader", choices=LOADERS, help="default: dali for photos, memory for digits")
    add("-b", "--batch-size", type=positive, default=32, help="default: %(default)s")
    add("-j", "--workers", type=positive, default=2, help="threads or processes of the loader (default: %(default)s)")
    add("--num-warm-iter", type=positive, default=20, help="iterations before the clock starts (default: %(default)s)")
    add("--num-bench-iter", type=positive, default=300, help="iterations that are timed; the epoch runner rounds up to "
        "whole epochs (default: %(default)s)")  # fmt: skip
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add(
        "--amp-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="autocast to it (default: float32, none)",
    )
    add("--step", choices=RECIPES, default="fused", help="recipe of the step (default: %(default)s)")
    add("--channels-last", action="store_true", help="let images and weights lie channels last")
    add("--seed", type=not_negative, default=0, help="default: %(default)s")
    add("--work-dir", help="keep logs and checkpoints there (default: a temporary folder)")
    add("--explain", action="store_true", help="print the plan: what was lowered, what reads the host")
    add("--no-tax", action="store_true", help="do not measure the runner tax")
    add("--results-file", metavar="OUT.JSON", help="write everything, with every sample")
    add("--report", metavar="OUT.HTML", help="write charts, as one file that needs no network")
    add("--trace", metavar="OUT.JSON", help="write the iterations as a trace for https://ui.perfetto.dev")
    contest_main.add_arguments(parser)
    return parser


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    return _at_least(1, int(text))


def not_negative(text: str) -> int:
    """An int of at least 0, for argparse."""
    return _at_least(0, int(text))


def _at_least(least: int, value: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"must be >= {least}, got {value}")
    return value


def make_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[Options, Path | None]:
    """What the command line says, checked as far as that is possible before anything runs."""
    args = parser.parse_args(argv)
    loaders = DATA[args.data].loaders
    loader = args.loader or loaders[0]
    if loader not in loaders:
        parser.error(f"--loader {loader} cannot read --data {args.data}; choose from {', '.join(loaders)}")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device {args.device} is no device that torch knows; choose cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device} is not supported; choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {args.device}: torch {torch.__version__} sees no such GPU here; use --device cpu")
    results = Path(args.results_file) if args.results_file else None
    for flag in ("results_file", "report", "trace"):
        name = getattr(args, flag)
        if name is not None and not Path(name).absolute().parent.is_dir():
            parser.error(f"--{flag.replace('_', '-')} {name}: its folder does not exist")
    taken = {field.name for field in fields(Options)} - {"loader", "tax"}
    named = {name: value for name, value in vars(args).items() if name in taken}
    return Options(loader=loader, tax=not args.no_tax, **named), results


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    options, _ = make_options(parser, argv)
    args = parser.parse_args(argv)
    if args.against is not None:
        return contest_main.main(args, parser)
    progress = Console(stderr=True)
    try:
        if progress.is_terminal:
            with progress.status("starting") as status:
                result = run(options, status.update)
        else:
            result = run(options, lambda doing: None)
    except OptionError as error:
        parser.error(str(error))
    except (ImportError, OSError) as error:  # an extra is missing, a folder is full or not ours
        print(f"python -m fastrunner.bench: {error}", file=sys.stderr)
        return 1
    render(result, Console())
    if result["training"]["plan"]:
        print(f"\n{result['training']['plan']}")
    return contest_main.write(result, args)


if __name__ == "__main__":
    sys.exit(main())
