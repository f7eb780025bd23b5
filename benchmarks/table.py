"""README's table of runners, written from records: python benchmarks/table.py [RECORD.json ...]

A record is what ``benchmarks/bench_runners.py --record``, or ``python -m fastrunner.bench --against NAMES
--results-file OUT.JSON``, has written, one workload each; without any, the newest of each workload in
benchmarks/records/. What is between the two marks in README.md is replaced.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = Path(__file__).resolve().parent / "records"
ORDER = ("toy", "mlp", "digits-cnn", "photos-resnet18", "vit-tiny", "gpt-nano")
BEGIN, END = "<!-- runners: written by benchmarks/table.py -->\n", "<!-- /runners -->"


def newest(folder: Path) -> list[Path]:
    """The newest record of each workload, the workloads in their order."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*_runners_*.json")):  # by date
        options = json.loads(path.read_text())["options"]
        if options["mode"] == "loop":
            found[options["workload"]] = path
    return [found[name] for name in sorted(found, key=lambda name: (*ORDER, name).index(name))]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each case, a column for each record; what the numbers are below it."""
    names = list(dict.fromkeys(name for record in records for name in record["cases"]))
    lines = [
        "| an iteration, us | " + " | ".join(record["options"]["workload"] for record in records) + " |",
        "|---|" + "---:|" * len(records),
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(cell(record, name) for record in records) + " |")
    machine = records[0]["machine"]
    dates = sorted({record["machine"]["time"][:10] for record in records})
    lines.append(
        f"\n{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {', '.join(dates)}. Medians of an "
        f"iteration (smaller is better), and how much longer it takes than {records[0]['base']}'s: the 95 % interval. "
        "Same model, weights, batches, optimizer (torch's, fused), clipping and log interval for all, float32."
    )
    slept = {
        name: case["sleep_per_epoch_s"]
        for record in records
        for name, case in record["cases"].items()
        if case.get("sleep_per_epoch_s") and not name.endswith(":nosleep")
    }
    if slept:
        words = " and ".join(f"{name} sleeps {seconds:.0f} s" for name, seconds in sorted(slept.items()))
        lines.append(f"Beside that {words} an epoch, which is in no number above.")
    noisy = [r["options"]["workload"] for r in records if r["machine"]["noisy"] or r["machine"]["during"]["noisy"]]
    if noisy:
        lines.append(f"The machine was not quiet ({', '.join(noisy)}).")
    return "\n".join(lines) + "\n"


def cell(record: dict[str, Any], name: str) -> str:
    """A case's median, and how it differs from fastrunner's first row."""
    case = record["cases"].get(name)
    if case is None or "median_ns" not in case:
        return "-"
    text = f"{case['median_ns'] / 1e3:,.4g}" if case["median_ns"] < 1e7 else f"{case['median_ns'] / 1e3:,.0f}"
    if "change" not in case:
        return f"**{text}**"
    change = case["change"]
    if change["verdict"] == "too noisy":
        return f"{text} (too noisy)"
    low, high = (in_words(change[end]) for end in ("low", "high"))
    return f"{text} ({low} to {high})"


def in_words(change: float) -> str:
    """A share, or a multiple where it is large."""
    return f"{change:+.0%}" if change < 1 else f"{1 + change:.1f} x"


def main(paths: list[str]) -> int:
    records = [json.loads(path.read_text()) for path in map(Path, paths)] if paths else []
    records = records or [json.loads(path.read_text()) for path in newest(RECORDS)]
    if not records:
        print(f"there are no records in {RECORDS}\n\n{__doc__}", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table(records) + END + rest.split(END, 1)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
