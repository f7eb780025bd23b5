"""``python -m fastrunner.bench compare before.json after.json``: what is faster, what is slower, beyond the noise."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .report import duration
from .statistics import Change, Samples, middle, unpaired

BLOCK = 20  # iterations of one run, neighbours of which are alike: their median stands for a process's


class NotAResult(ValueError):
    """A file that the bench has not written; the message names it."""


def read(path: str) -> dict[str, Any]:
    """A result of the bench.

    Raises:
        OSError: it cannot be read.
        NotAResult: it is something else.
    """
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise NotAResult(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or "machine" not in found or not dict(timed(found)):
        raise NotAResult(f"{path} holds no samples of the bench: write it with --results-file")
    return found


def timed(result: dict[str, Any]) -> Iterator[tuple[str, Samples]]:
    """Name and samples [process][round] of everything in a result that was timed, in nanoseconds."""
    for name, case in result.get("cases", {}).items():
        if case["samples_ns"] and not case["failed"]:
            yield name, case["samples_ns"]
    if "training" in result:
        yield "iteration", blocks(result["training"]["iter"]["samples_ns"])
        yield "data wait", blocks(result["training"]["data_wait"]["samples_ns"])


def blocks(samples: list[float]) -> Samples:
    """Consecutive samples of one process as blocks that take the place of processes."""
    size = min(BLOCK, max(1, len(samples) // 6))
    return [samples[i : i + size] for i in range(0, len(samples) - size + 1, size)]


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Change]:
    """What both results have timed: by how much it changed."""
    old = dict(timed(before))
    return {name: unpaired(samples, old[name]) for name, samples in timed(after) if name in old}


def render(before: dict[str, Any], after: dict[str, Any], found: dict[str, Change], console: Console) -> None:
    """A row for each thing that both results timed; warnings where the results are not alike."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for number, column in enumerate(("", "before", "after", "change", "95 % interval")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    old, new = dict(timed(before)), dict(timed(after))
    styles = {"slower": "bold red", "faster": "bold green"}
    for name, change in found.items():
        verdict = change.verdict
        table.add_row(
            name[:34],
            duration(middle(old[name])),
            duration(middle(new[name])),
            f"[{styles.get(verdict, 'dim')}]{f'{change.median:+.1%}' if verdict in styles else verdict}[/]",
            f"{change.low:+.1%} to {change.high:+.1%}" if verdict != "too noisy" else "-",
        )
    console.print(table)
    for sentence in unlike(before, after):
        console.print(f"[bold yellow]warning:[/] {sentence}", highlight=False)


def unlike(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else is different, which may be the reason: machine, versions, options, load."""
    found = []
    for key in ("cpu", "cores", "threads", "torch", "python", "isa", "gpu"):
        a, b = (result["machine"].get(key) for result in (before, after))
        if a != b:
            found.append(f"{key}: {a} before, {b} after")
    old, new = before.get("options", {}), after.get("options", {})
    for key in sorted((old.keys() & new.keys()) - {"against", "work_dir", "peers_python"}):
        if old[key] != new[key]:
            found.append(f"--{key.replace('_', '-')}: {old[key]} before, {new[key]} after")
    for when, result in (("before", before), ("after", after)):
        if result["machine"].get("noisy") or result["machine"].get("during", {}).get("noisy"):
            found.append(f"the machine was not quiet {when}")
    return found


def main(argv: list[str]) -> int:
    """0: nothing is slower. 1: something is, beyond the noise. 2: the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m fastrunner.bench compare", description=__doc__)
    parser.add_argument("before", metavar="BEFORE.JSON")
    parser.add_argument("after", metavar="AFTER.JSON")
    args = parser.parse_args(argv)
    try:
        before, after = read(args.before), read(args.after)
    except (OSError, NotAResult) as error:
        print(f"python -m fastrunner.bench compare: {error}", file=sys.stderr)
        return 2
    found = differences(before, after)
    if not found:
        print("python -m fastrunner.bench compare: the two files have nothing in common", file=sys.stderr)
        return 2
    render(before, after, found, Console())
    slower = [name for name, change in found.items() if change.verdict == "slower"]
    if slower:
        print(f"slower beyond the noise: {', '.join(slower)}")
    return int(bool(slower))
