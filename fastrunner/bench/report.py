"""A result of the bench as text that fits 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .training import PARTS, RUNNERS

LABELS = {
    "data": ("data wait", "until the batch is there"),
    "step": ("step", "forward, backward, clip, update"),
    "hooks": ("hooks", "lr, checkpoint, timer"),
    "logging": ("logging", "text log"),
    "rest": ("rest", "the loop, epoch ends, these clocks"),
}


def duration(ns: float, sign: str = "") -> str:
    """Three digits in the fitting unit; ``sign="+"`` shows the sign of positive ones too."""
    for unit, size in (("s ", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(ns) >= size * 0.9995 or unit == "us":  # 999.95 us would be printed as 1,000 us
            value = ns / size
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:{sign},.{digits}f} {unit}"
    raise AssertionError("unreachable: microseconds take everything")


def render(result: dict[str, Any], console: Console) -> None:
    """Print everything that was measured, in the order: what ran, how fast, where the time went, what it learned."""
    options, machine = result["options"], result["machine"]
    console.print()
    console.print(
        f"[bold]{RUNNERS[options['runner']]}[/]: {options['model']} ({result['num_parameters']:,} parameters) on "
        f"{options['data']}, loader {options['loader']}, batch {options['batch_size']}, {options['amp_dtype']}"
        f"{', channels last' if options['channels_last'] else ''}, {options['device']}",
        highlight=False,
    )
    _speed(result["training"], console)
    _split(result["split"], console)
    if "tax" in result:
        _tax(result["tax"], console)
    _learning(result, console)
    _machine(machine, result["seconds"], console)


def _print(console: Console, title: str, note: str, rows: Sequence[tuple[str, ...]], justify: str = "right") -> None:
    """A heading, and rows of label, number and remarks below it."""
    console.print()
    console.print(f"[bold]{title}[/]" + (f"  [dim]{note}[/]" if note else ""), highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=13)
    table.add_column(justify=justify, min_width=9)  # type: ignore[arg-type]
    for _ in rows[0][2:-1]:
        table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row("  " + row[0], *row[1:])
    console.print(table)


def _speed(training: dict[str, Any], console: Console) -> None:
    iters, wait = training["iter"], training["data_wait"]
    rows = [
        ("iterations/s", f"{training['iters_per_s']:,.4g}", "epoch ends, logs and checkpoints included"),
        ("samples/s", f"{training['samples_per_s']:,.4g}", ""),
        (
            "iteration",
            duration(iters["median_ns"]),
            f"median +- {duration(iters['mad_ns']).strip()} (MAD); fastest {duration(iters['min_ns'])}",
        ),
        ("data wait", duration(wait["median_ns"]), f"median; longest {duration(max(wait['samples_ns']))}"),
    ]
    note = f"{training['timed_iters']:,} iterations after {training['warm_iters']} to warm up"
    _print(console, "Throughput", note, rows)


def _split(split: dict[str, Any], console: Console) -> None:
    means = split["mean_ns"]
    total = sum(means.values())
    rows = [(LABELS[part][0], duration(means[part]), f"{means[part] / total:.1%}", LABELS[part][1]) for part in PARTS]
    rows.append(("together", duration(total), "", ""))
    if split["mean_ready"] is not None:
        rows.append(("ready", f"{split['mean_ready']:.1f}", "", "batches that lay ready when one was asked for"))
    note = f"a second pass, with clocks; mean of {split['timed_iters']:,}"
    _print(console, "Where an iteration goes", note, rows)


def _tax(tax: dict[str, Any], console: Console) -> None:
    rows = []
    for label, key in (("this step", "step"), ("no-op step", "noop"), ("  and logging", "noop_logging")):
        case = tax[key]
        low, middle, high = (duration(1e3 * case["tax_us"][name], "+") for name in ("low", "median", "high"))
        note = f"{case['rounds']} x {case['iters_per_round']:,}, bare {duration(case['bare']['median_ns'])}"
        rows.append((label, middle, f"[{low}, {high}]".replace(" ]", "]"), note))
    _print(console, "Runner tax", "an iteration, over a bare loop; median and 95 % interval", rows)
    tax_us, bare = tax["step"]["tax_us"], duration(tax["step"]["bare"]["median_ns"]).strip()
    words = ""
    if tax_us["contains_zero"]:
        words = f"The first interval contains 0: no tax can be seen behind a step of {bare}."
    elif tax_us["high"] < 0:
        words = "The first interval is below 0, which no tax can be: the machine was too unsteady to see one."
    if words:
        console.print(f"  {words}", style="dim", highlight=False)


def _learning(result: dict[str, Any], console: Console) -> None:
    training, val = result["training"], result["val"]
    rows = [
        ("first loss", f"{training['first_loss']:.3f}", f"mean of the first {training['log_interval']} iterations"),
        (
            "last loss",
            f"{training['last_loss']:.3f}",
            f"mean of {training['log_interval']} after {training['num_iters']:,}",
        ),
        ("val accuracy", f"{val['accuracy']:.1%}", f"of {val['num_samples']:,} samples; chance is {val['chance']:.0%}"),
    ]
    _print(console, "Learning", "", rows)


def _machine(machine: dict[str, Any], seconds: dict[str, float], console: Console) -> None:
    rows = [
        ("processor", machine["cpu"], ""),
        ("cores", f"{machine['cores']}; torch uses {machine['threads']} threads, the core {machine['isa']}", ""),
        ("software", f"torch {machine['torch']}, Python {machine['python']}, fastrunner {machine['fastrunner']}", ""),
        ("load before", ", ".join(f"{load:.2f}" for load in machine["load"]) + " (1, 5, 15 minutes)", ""),
        ("this bench", ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items()) + " s", ""),
    ]
    if "gpu" in machine:
        rows.insert(1, ("GPU", machine["gpu"], ""))
    _print(console, "Machine", "", rows, justify="left")
    if machine["noisy"]:
        console.print(
            f"[bold yellow]warning:[/] the load was {machine['load'][0]:.1f} before the start: other work makes these "
            "numbers slower and wider than the machine is",
            highlight=False,
        )
