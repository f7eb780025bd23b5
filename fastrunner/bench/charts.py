"""Charts as SVG text: bars with intervals, a stacked bar, a timeline, a curve. Colours are CSS variables of the page.

All widths and heights are in the units of the viewBox, which is WIDTH wide; a browser scales it to the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10

from .report import duration

WIDTH = 860
LABEL = 150  # left of the bars
ROW = 30
PAD = 28


def bars(rows: Sequence[tuple[str, float, float, float, str]], highlight: str | None = None) -> str:
    """Horizontal bars from zero, with intervals.

    Args:
        rows: (name, value, low, high, text at the end) in nanoseconds.
        highlight: the name whose bar has the accent colour.
    """
    if not rows:
        return ""
    room = WIDTH - LABEL - 200
    # one interval that runs away must not press all bars flat
    most = max(min(high, 2 * max(value for _, value, *_ in rows)) for _, _, _, high, _ in rows)
    parts = []
    for number, (name, value, low, high, text) in enumerate(rows):
        y = number * ROW + 4
        at = [LABEL + room * max(0.0, min(x, most)) / most for x in (value, low, high)]
        kind = "accent" if name == highlight else "bar"
        parts += [
            f'<text class="name" x="{LABEL - 10}" y="{y + 15}">{escape(name)}</text>',
            f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{at[0] - LABEL:.1f}" height="20" rx="2">'
            f"<title>{escape(name)}: {duration(value)}</title></rect>",
        ]
        if high > low:
            parts.append(
                f'<path class="whisker" d="M{at[1]:.1f} {y + 10}H{at[2]:.1f}'
                f'M{at[1]:.1f} {y + 5}v10M{at[2]:.1f} {y + 5}v10">'
                f"<title>95 %: {duration(low)} to {duration(high)}</title></path>"
            )
        parts.append(f'<text x="{max(at) + 10:.1f}" y="{y + 15}">{escape(text)}</text>')
    return svg(len(rows) * ROW + 8, parts, "times with intervals")


def stacked(parts_ns: Mapping[str, float]) -> str:
    """One bar in shares, with a legend below it."""
    total = sum(max(0.0, ns) for ns in parts_ns.values()) or 1.0
    drawn, x, legend_x = [], 0.0, 0
    for name, ns in parts_ns.items():
        width = WIDTH * max(0.0, ns) / total
        drawn.append(
            f'<rect class="part-{name}" x="{x:.1f}" y="0" width="{width:.1f}" height="34">'
            f"<title>{name}: {duration(ns)}, {max(0.0, ns) / total:.1%}</title></rect>"
        )
        x += width
        label = f"{name} {duration(ns).strip()} ({max(0.0, ns) / total:.0%})"
        drawn.append(f'<rect class="part-{name}" x="{legend_x}" y="48" width="11" height="11" rx="2"/>')
        drawn.append(f'<text x="{legend_x + 17}" y="58">{escape(label)}</text>')
        legend_x += 172
    return svg(66, drawn, "the split of an iteration")


def timeline(wholes_ns: Sequence[float], stalls: Sequence[Mapping[str, object]]) -> str:
    """A bar for each iteration on a logarithmic scale; stalls in the colour of their cause, with their names."""
    if not wholes_ns:
        return ""
    height = 190
    low = max(1.0, min(wholes_ns)) * 0.8
    span = log10(max(wholes_ns) * 1.1 / low)
    step = (WIDTH - 70) / len(wholes_ns)
    causes = {int(str(stall["index"])): str(stall["cause"]) for stall in stalls}
    drawn = _log_grid(low, span, height)
    for i, ns in enumerate(wholes_ns):
        top = height * (1 - log10(max(ns, low) / low) / span)
        cause = causes.get(i)
        kind = "stall-" + cause.replace(" ", "-") if cause else "iter"
        drawn.append(
            f'<rect class="{kind}" x="{70 + i * step:.2f}" y="{top:.1f}" width="{max(0.6, step * 0.8):.2f}" '
            f'height="{height - top:.1f}">'
            f"<title>iteration {i}: {duration(ns)}{', ' + cause if cause else ''}</title></rect>"
        )
    drawn.append(f'<text x="70" y="{height + 18}">iteration 0</text>')
    drawn.append(f'<text class="name" x="{WIDTH}" y="{height + 18}">{len(wholes_ns) - 1:,}</text>')
    for number, cause in enumerate(sorted(set(causes.values()))):
        x, count = 70 + number * 160, sum(name == cause for name in causes.values())
        drawn.append(
            f'<rect class="stall-{cause.replace(" ", "-")}" x="{x}" y="{height + 32}" width="11" height="11"/>'
        )
        drawn.append(f'<text x="{x + 17}" y="{height + 42}">{escape(cause)}: {count}</text>')
    return svg(height + 50, drawn, "the time of each iteration")


def _log_grid(low: float, span: float, height: float) -> list[str]:
    drawn = []
    exponent = floor(log10(low))
    while 10.0**exponent < low * 10**span:
        for digit in (1, 2, 5):
            value = digit * 10.0**exponent
            if low <= value <= low * 10**span:
                y = height * (1 - log10(value / low) / span)
                drawn.append(f'<path class="grid" d="M70 {y:.1f}H{WIDTH}"/>')
                drawn.append(f'<text class="name" x="62" y="{y + 4:.1f}">{duration(value).strip()}</text>')
        exponent += 1
    return drawn


def curve(values: Sequence[float], every: int) -> str:
    """Values against the iterations at which they were logged."""
    if not values:
        return ""
    height, least, most = 160, min(values), max(values)
    span = (most - least) or 1.0
    points = [
        (70 + (WIDTH - 80) * i / max(1, len(values) - 1), 8 + (height - 16) * (1 - (value - least) / span))
        for i, value in enumerate(values)
    ]
    drawn = [f'<path class="grid" d="M70 {y}H{WIDTH}"/>' for y in (8, height - 8)]
    drawn += [
        f'<text class="name" x="62" y="12">{most:.4g}</text>',
        f'<text class="name" x="62" y="{height - 4}">{least:.4g}</text>',
        '<path class="curve" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + '"/>',
        f'<text x="70" y="{height + 16}">iteration {every}</text>',
        f'<text class="name" x="{WIDTH}" y="{height + 16}">{every * len(values):,}</text>',
    ]
    drawn += [
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
        f"<title>iteration {every * (i + 1)}: {value:.5g}</title></circle>"
        for i, ((x, y), value) in enumerate(zip(points, values, strict=True))
    ]
    return svg(height + 22, drawn, "loss")


def svg(height: float, parts: Sequence[str], label: str) -> str:
    """Parts as one picture, with a name for those who do not see it."""
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg></figure>"
    )
