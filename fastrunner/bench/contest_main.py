"""The command line of ``--against``: runs a comparison, prints it, writes what was asked for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from .account import trace
from .contest import ContestOptions, contest
from .contest_report import render
from .page import account_of, page
from .workloads.named import NAMED, WorkloadError

DEFAULT = "digits-cnn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only a comparison has."""
    add = parser.add_argument_group("comparison with other runners").add_argument
    add("--against", metavar="NAMES", help="raw,mmcv,mmengine,ignite,accelerate,lightning, or some of them; "
        "fastrunner:RECIPE and mmcv:nosleep name variants, raw+bf16+channels_last options")  # fmt: skip
    add("--workload", help=f"{', '.join(NAMED)}, or a factory pkg.module:function (default: {DEFAULT})")
    add("--config", metavar="MY.PY", help="compare on the model, data and optimizer of a config instead")
    add("--mode", choices=("loop", "system"), default="loop", help="loop: all read the same batches in memory; "
        "system: each with the loader that its documentation advises (default: %(default)s)")  # fmt: skip
    add("--sessions", type=int, default=6, help="processes of each runner, at most (default: %(default)s)")
    add("--rounds", type=int, default=6, help="in each process, at most (default: %(default)s)")
    add("--budget", type=float, default=540.0, help="seconds for everything together (default: %(default)s)")
    add("--threads", type=int, default=0, help="of torch; 0: one a core (default)")
    add("--peers-python", default=".venv-peers/bin/python", help="the environment that `make peers` makes")


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0: everything that was asked for was measured. 1: something is missing. 2: nonsense was asked for."""
    for name, least in (("sessions", 1), ("rounds", 2), ("budget", 1), ("threads", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be >= {least}, got {getattr(args, name)}")
    names = [name.strip() for name in args.against.split(",") if name.strip()]
    if args.step != "fused" and not any(name.split(":")[0] == "fastrunner" for name in names):
        names.insert(0, f"fastrunner:{args.step}")
    options = ContestOptions(
        against=tuple(names),
        workload=args.config or args.workload or DEFAULT,
        budget_s=args.budget,
        options=("+bf16" if args.amp_dtype == "bfloat16" else "") + ("+channels_last" if args.channels_last else ""),
        **{key: getattr(args, key) for key in ("runner", "mode", "device", "threads", "workers", "seed", "sessions",
                                               "rounds", "peers_python")},
    )  # fmt: skip
    progress = Console(stderr=True)
    try:
        result = watched(lambda say: contest(options, say), progress)
    except (ValueError, WorkloadError) as error:
        parser.error(str(error))
    except (ImportError, OSError) as error:
        print(f"python -m fastrunner.bench: {error}", file=sys.stderr)
        return 1
    render(result, Console())
    return max(write(result, args), missing(result))


def watched(run: Callable[[Callable[[str], None]], dict[str, Any]], progress: Console) -> dict[str, Any]:
    """With a line that says what is going on, where there is a terminal."""
    if not progress.is_terminal:
        return run(lambda doing: None)
    with progress.status("starting") as status:
        return run(status.update)


def missing(result: dict[str, Any]) -> int:
    """1 if a case that was asked for has no result, or the machine was too noisy for one."""
    cases = result["cases"].values()
    return int(any(case["failed"] or case.get("change", {}).get("verdict") == "too noisy" for case in cases))


def write(result: dict[str, Any], args: argparse.Namespace) -> int:
    """The files that were asked for; 1 if one cannot be written, or has nothing to hold."""
    account = account_of(result)
    texts: list[tuple[str | None, Callable[[], str]]] = [
        (args.results_file, lambda: json.dumps(result) + "\n"),
        (args.report, lambda: page(result)),
    ]
    code = 0
    if account is not None:
        texts.append((args.trace, lambda: json.dumps(trace(account)) + "\n"))
    elif args.trace is not None:
        print("python -m fastrunner.bench: no trace: fastrunner itself could not be measured", file=sys.stderr)
        code = 1
    for name, text in texts:
        if name is not None:
            try:
                Path(name).write_text(text())
            except OSError as error:
                print(f"python -m fastrunner.bench: cannot write {name}: {error}", file=sys.stderr)
                code = 1
    return code
