"""A comparison of runners as a table that fits 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .report import duration
from .statistics import in_words

COLUMNS = ("runner", "iteration", "against it", "95 % interval", "of limit", "sleeps")


def render(result: dict[str, Any], console: Console) -> None:
    """Print what was compared, a row for each case, what failed, the verdict, and the machine."""
    options, plan = result["options"], result["plan"]
    console.print()
    console.print(
        f"[bold]{options['workload']}[/] ({result['num_parameters']:,} parameters), batch {result['batch_size']}, "
        f"runner {options['runner']}, mode {options['mode']}, {options['device']}",
        highlight=False,
    )
    if plan:
        console.print(
            f"[dim]{plan['sessions']} processes a runner x {plan['rounds']} rounds x "
            f"{_iterations(plan['rounds_of'])} iterations, in turns; medians[/]",
            highlight=False,
        )
    console.print(_table(result))
    for name, case in result["cases"].items():
        if case["failed"]:
            console.print(f"  [yellow]{name}[/]: {case['failed']}", highlight=False)
    console.print(f"\n  {result['sentence']}.", highlight=False)
    noisy = [name for name, case in result["cases"].items() if case.get("change", {}).get("verdict") == "too noisy"]
    if noisy:
        console.print(
            f"  [yellow]too noisy to compare[/]: {', '.join(noisy)}; on a quiet machine, or with a larger --budget, "
            "there is an answer",
            highlight=False,
        )
    for note in sorted({case.get("note") for case in result["cases"].values() if case.get("note")}):
        console.print(f"  [dim]{note}[/]", highlight=False)
    _agreement(result, console)
    _limits(result, console)
    _machine(result["machine"], console)


def _iterations(rounds_of: dict[str, dict[str, int]]) -> str:
    """Of a round: a slower case has fewer."""
    numbers = sorted({each["num_iters"] for each in rounds_of.values()})
    return f"{numbers[0]:,}" + (f" to {numbers[-1]:,}" if len(numbers) > 1 else "")


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="dim")
    table.add_column(COLUMNS[0], overflow="fold")
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    cases = result["cases"]
    for name in sorted(cases, key=lambda name: cases[name].get("median_ns", float("inf"))):
        table.add_row(*_row(name, cases[name], name in result["winners"], name == result["base"]))
    return table


def share_of(part: float) -> str:
    """A share of a limit, with a digit more where it is small."""
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"


def _row(name: str, case: dict[str, Any], first: bool, base: bool) -> tuple[str, ...]:
    name = f"[bold green]{name}[/]" if first else f"[bold]{name}[/]" if base else name
    if case["failed"]:
        return (f"  {name}", "-", "", "", "", "")
    share = share_of(case["limit_share"]) if case.get("limit_share") else ""
    sleeps = f"{case['sleep_per_epoch_s']:.0f} s/epoch" if case.get("sleep_per_epoch_s") else ""
    sleeps = "removed" if sleeps and ":nosleep" in name else sleeps
    if "change" not in case:
        return (f"  {name}", duration(case["median_ns"]), "", "", share, sleeps)  # what the others are held against
    found = case["change"]
    words = {"no difference": "the same", "too noisy": "too noisy"}.get(found["verdict"]) or in_words(found["median"])
    return (
        f"  {name}",
        duration(case["median_ns"]),
        words,
        "-" if found["verdict"] == "too noisy" else f"{in_words(found['low'])} to {in_words(found['high'])}",
        share,
        sleeps,
    )


def _agreement(result: dict[str, Any], console: Console) -> None:
    off = [case["weights_off"] for case in result["cases"].values() if "weights_off" in case and not case["failed"]]
    iterations = max((case.get("iterations", 0) for case in result["cases"].values()), default=0)
    if off:
        console.print(
            f"  [dim]same work: after {iterations} iterations all weights agree within {max(off):.1e} of their way[/]",
            highlight=False,
        )


def _limits(result: dict[str, Any], console: Console) -> None:
    limits = result.get("limits")
    if limits:
        for sentence in limits["sentences"]:
            console.print(f"  {sentence}", highlight=False)


def _machine(machine: dict[str, Any], console: Console) -> None:
    during = machine.get("during", {})
    console.print(
        f"  [dim]{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}[/]",
        highlight=False,
    )
    words = []
    if machine["noisy"]:
        words.append(f"the load was {machine['load'][0]:.1f} before the start")
    if during.get("noisy"):
        if during["others_cores"] is not None:
            words.append(f"others used {during['others_cores']:.1f} cores meanwhile")
        words.append(f"the same work took up to {during['spin_p90_over_min']:.1f} times as long")
    if words:
        console.print(f"  [bold yellow]warning:[/] {'; '.join(words)}", highlight=False)
