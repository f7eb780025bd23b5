"""A result of the bench as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import accumulate
from typing import Any

from . import charts
from .account import stalls
from .report import duration
from .statistics import in_words
from .training import PARTS

STYLE = """
:root { --back: #fdfdfb; --ink: #1d2126; --soft: #666d76; --line: #e2e2dc; --bar: #9db2c6; --accent: #1f7a4d;
  --data: #4c78a8; --hooks: #e0a13a; --log: #b3589a; --rest: #9aa0a6; --gc: #d1495b; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --back: #16191d; --ink: #e6e6e1; --soft: #9aa0a6; --line: #30353b;
  --bar: #4d6277; --accent: #3fae78; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 900px;
  margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); } .verdict { font-size: 1.05rem; margin: 1rem 0; }
.warning { border-left: 4px solid var(--hooks); padding: .2rem .8rem; }
figure { margin: 0; overflow-x: auto; }
svg { width: 100%; min-width: 720px; height: auto; display: block; } svg text { font-size: 12px; fill: var(--ink); }
svg text.name { text-anchor: end; } .grid { stroke: var(--line); }
.bar, .iter { fill: var(--bar); } .accent, .dot { fill: var(--accent); }
.whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; }
.curve { fill: none; stroke: var(--accent); stroke-width: 2; }
.part-data, .stall-data { fill: var(--data); } .part-step, .stall-step { fill: var(--accent); }
.part-hooks, .stall-checkpoint { fill: var(--hooks); } .part-logging, .stall-log { fill: var(--log); }
.part-rest, .stall-epoch-end { fill: var(--rest); } .stall-GC { fill: var(--gc); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); padding: .8rem; }
"""


def page(result: Mapping[str, Any]) -> str:
    """The whole file. A result of ``--against`` or of a single run; a section that has no data is left out."""
    options, machine = result["options"], result["machine"]
    found = account_of(result)
    title = options.get("workload") or f"{options['model']} on {options['data']}"
    what = [f"{result['num_parameters']:,} parameters", f"batch {result.get('batch_size', options.get('batch_size'))}",
            f"runner {options['runner']}", *([f"mode {options['mode']}"] if "mode" in options else []),
            options["device"], machine["time"]]  # fmt: skip
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(", ".join(what))}</p>']
    if result.get("sentence"):
        body.append(f'<p class="verdict">{escape(result["sentence"])}.</p>')
    if machine.get("noisy") or machine.get("during", {}).get("noisy"):
        body.append('<p class="warning">The machine was not quiet: read these numbers with that in mind.</p>')
    body += _comparison(result)
    if "training" in result:
        training = result["training"]
        body.append(f"<p>{training['iters_per_s']:,.4g} iterations/s, {training['samples_per_s']:,.4g} samples/s</p>")
    body += _limits(result)
    if found is not None:
        body += _account(found)
    body += _section("Machine", _facts(machine))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>"
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def account_of(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where single iterations went: as a comparison has it, or from the second pass of a single run."""
    if "split" not in result:
        account: dict[str, Any] | None = result.get("account")
        return account
    parts = result["split"]["samples_ns"]
    wholes = [sum(values) for values in zip(*(parts[part] for part in PARTS), strict=True)]
    begins = [0, *accumulate(round(whole) for whole in wholes)][:-1]
    training = result["training"]
    return {
        "parts": parts,
        "begins": begins,
        "stalls": stalls(parts, begins, ()),
        "losses": training["losses"],
        "log_interval": training["log_interval"],
        "hooks": {},
        "plan": training.get("plan"),
    }


def _section(title: str, content: str, note: str = "") -> list[str]:
    if not content:
        return []
    return [f"<h2>{escape(title)}</h2>", f'<p class="soft">{escape(note)}</p>' if note else "", content]


def _comparison(result: Mapping[str, Any]) -> list[str]:
    cases, base = result.get("cases", {}), result.get("base")
    timed = {name: case for name, case in cases.items() if "median_ns" in case}
    rows = []
    for name, case in sorted(timed.items(), key=lambda item: item[1]["median_ns"]):
        value, low, high, text = case["median_ns"], case["median_ns"], case["median_ns"], ""
        if base in timed and "change" in case:  # the interval is that of the difference from the base
            middle, change = timed[base]["median_ns"], case["change"]
            low, high = middle * (1 + change["low"]), middle * (1 + change["high"])
            verdict = change["verdict"]
            text = f", {in_words(change['median'])}" if verdict in ("slower", "faster") else f", {verdict}"
        rows.append((name, value, low, high, duration(value).strip() + text))
    failed = "".join(
        f"<p>{escape(name)}: {escape(case['failed'])}</p>" for name, case in cases.items() if case["failed"]
    )
    sleeps = "".join(
        f"<p>{escape(name)} sleeps {case['sleep_per_epoch_s']:.0f} s an epoch, which is not in its bar.</p>"
        for name, case in cases.items()
        if case.get("sleep_per_epoch_s") and not name.endswith(":nosleep")
    )
    recipes = "".join(
        f'<p class="soft">{escape(name)}: {escape("; ".join(case["step"]))}</p>'
        for name, case in cases.items()
        if case.get("step")
    )
    note = f"medians, and the 95 % interval of the difference from {base}" if base else ""
    return _section("An iteration", charts.bars(rows, base) + failed + sleeps + recipes, note)


def _limits(result: Mapping[str, Any]) -> list[str]:
    limits = result.get("limits")
    if not limits:
        return []
    return _section("Limits", "".join(f"<p>{escape(sentence)}.</p>" for sentence in limits["sentences"]))


def _account(found: Mapping[str, Any]) -> list[str]:
    parts, count = found["parts"], len(found["begins"])
    means = {part: sum(parts[part]) / max(1, count) for part in PARTS}
    wholes = [sum(parts[part][i] for part in PARTS) for i in range(count)]
    hooks = sorted(found["hooks"].items(), key=lambda item: -item[1])
    rows = [(name, ns, ns, ns, duration(ns).strip()) for name, ns in hooks]
    plan = f"<pre>{escape(found['plan'])}</pre>" if found.get("plan") else ""
    return [
        *_section(
            "Where an iteration goes",
            charts.stacked(means),
            f"mean of {count:,}; "
            + (
                "one compiled call each: what is between its hooks is in the step"
                if found.get("whole")
                else "with clocks between the hooks"
            ),
        ),
        *_section(
            "Iterations, one by one",
            charts.timeline(wholes, found["stalls"]),
            "stalls (more than twice the median) have the colour of what took too long",
        ),
        *_section("Loss", charts.curve(found["losses"], found["log_interval"])),
        *_section(
            "Hooks",
            charts.bars(rows),
            "an iteration, with recipe fused and each hook called every time; OptimizerHook runs the backward",
        ),
        *_section("Plan", plan),
    ]


def _facts(machine: Mapping[str, Any]) -> str:
    rows = []
    for name, value in {**machine, **machine.get("during", {})}.items():
        if name != "during" and value is not None:
            values = value if isinstance(value, list) else [value]
            text = ", ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in values)
            rows.append(f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(text)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
