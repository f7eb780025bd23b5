"""README's table of runners, written from records: python benchmarks/table.py benchmarks/records/*_runners_*.json

A record is what ``python -m fastrunner.bench --against ... --results-file`` has written,
one workload each. What is between the two marks in README.md is replaced.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- runners: written by benchmarks/table.py -->\n", "<!-- /runners -->"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each case, a column for each record; the machine below it."""
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
        f"\n{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {', '.join(dates)}; medians, and the "
        "95 % interval of the difference from fastrunner. Sleeps are not in it."
    )
    if any(record["machine"]["noisy"] or record["machine"]["during"]["noisy"] for record in records):
        lines.append("The machine was not quiet.")
    return "\n".join(lines) + "\n"


def cell(record: dict[str, Any], name: str) -> str:
    """A case's median, and how it differs from fastrunner's."""
    case = record["cases"].get(name)
    if case is None or "median_ns" not in case:
        return "-"
    text = f"{case['median_ns'] / 1e3:,.4g}"
    if "change" not in case:
        return f"**{text}**"
    change = case["change"]
    return f"{text} ({change['low']:+.0%} to {change['high']:+.0%})"


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    records = [json.loads(Path(path).read_text()) for path in paths]
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table(records) + END + rest.split(END, 1)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
