"""The drawings of an evaluation report as inline SVG: dots with intervals, lines by k, scatter, forest, waterfall, small bars.

A drawing is 360 units wide, so that its letters stay readable on a phone and two stand side by side on a desk. Colours come
from the page's CSS variables by class (channel, stage, baseline, ranker), for light and dark. Each has a title and a
description that says the figures in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH = 360
LINE = 19
"""Height of one row of a list of dots."""


class Point(NamedTuple):
    """A labelled value with its kind, and its interval where there is one."""

    name: str
    kind: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


def svg(height: float, title: str, description: str, body: Sequence[str], *, width: float = WIDTH) -> str:
    """One drawing: role img, with its title and description for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}. {escape(description)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(body)}</svg>"
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", cls: str = "") -> str:
    """A line of letters with its baseline at (x, y)."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{f" class={chr(34)}{cls}{chr(34)}" if cls else ""}>{escape(words)}</text>'


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About n round numbers that span low..high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / n
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number as short as it can be read."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def dots(title: str, points: Sequence[Point], *, zero: bool = True, digits: int = 4) -> str:
    """A line a row: its name, a dot on a common scale with its interval, its value. With `zero` the scale starts there."""
    known = [p for p in points if math.isfinite(p.value)]
    if not known:
        return ""
    ends = [v for p in known for v in (p.value, p.low, p.high) if v is not None]
    low, high = min(ends), max(ends)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    high = high if high > low else low + 1
    left, right = 104.0, WIDTH - 56.0
    height = LINE * len(known) + 34

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    body = []
    for tick in ticks(low, high, 3):
        cls = "zero" if tick == 0 else "grid"
        body.append(f'<line class="{cls}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{height - 24:.1f}"/>')
        body.append(text(x(tick), height - 9, shown(tick), anchor="middle", cls="tick"))
    for i, p in enumerate(known):
        y = 16 + i * LINE
        body.append(text(left - 8, y + 4, p.name, anchor="end"))
        if p.low is not None and p.high is not None:
            body.append(f'<line class="whisker {p.kind}" x1="{x(p.low):.1f}" x2="{x(p.high):.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="{p.kind}" cx="{x(p.value):.1f}" cy="{y}" r="4"/>')
        body.append(
            text(
                WIDTH - 2, y + 4, f"{p.value:+.{digits}f}{p.note}" if not zero else f"{p.value:.{digits}f}{p.note}", anchor="end", cls="num"
            )
        )
    return svg(height, title, "; ".join(f"{p.name} {p.value:.{digits}f}" for p in known), body)


def lines(title: str, curves: Mapping[str, Sequence[float]], kinds: Mapping[str, str], *, bold: Sequence[str], x_label: str) -> str:
    """A line a row over 1..n; those of `bold` are named at their ends, the others stand behind them, thin."""
    known = {n: c for n, c in curves.items() if c and all(v is not None and math.isfinite(v) for v in c)}
    if not known:
        return ""
    n = max(len(c) for c in known.values())
    top = max(max(c) for c in known.values()) or 1.0
    left, right, upper, lower = 34.0, WIDTH - 88.0, 10.0, 196.0

    def at(i: int, v: float) -> tuple[float, float]:
        return left + i / max(n - 1, 1) * (right - left), lower - v / top * (lower - upper)

    body = _frame(ticks(0, top), lambda v: at(0, v)[1], left, right)
    for k in sorted({1, *range(5, n + 1, 5), n}):
        body.append(text(at(k - 1, 0)[0], lower + 15, str(k), anchor="middle", cls="tick"))
    body.append(text((left + right) / 2, lower + 31, x_label, anchor="middle", cls="tick"))
    ends = []
    for name, curve in sorted(known.items(), key=lambda item: item[0] in bold):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, v) for i, v in enumerate(curve)))
        strong = name in bold
        body.append(f'<polyline class="curve {kinds[name]}{"" if strong else " faint"}" points="{path}"/>')
        if strong:
            ends.append((at(len(curve) - 1, curve[-1])[1], name))
    for y, name in _apart(ends, 12.5, upper, lower):
        body.append(text(right + 6, y + 4, name, cls=f"label {kinds[name]}"))
    return svg(lower + 38, title, "; ".join(f"{m} ends at {known[m][-1]:.4f}" for m in bold if m in known), body)


def _frame(levels: Sequence[float], y: Any, left: float, right: float) -> list[str]:
    out = []
    for v in levels:
        out.append(f'<line class="{"zero" if v == 0 else "grid"}" x1="{left}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>')
        out.append(text(left - 5, y(v) + 4, shown(v), anchor="end", cls="tick"))
    return out


def _apart(ends: Sequence[tuple[float, str]], gap: float, upper: float, lower: float) -> list[tuple[float, str]]:
    """Labels moved down, then up, until none covers another."""
    names = [name for _, name in sorted(ends)]
    places = [y for y, _ in sorted(ends)]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    if places:
        places[-1] = min(places[-1], lower)
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - gap)
    return [(max(y, upper), name) for y, name in zip(places, names, strict=True)]


def scatter(title: str, points: Sequence[tuple[str, str, float, float]], *, x_label: str, y_label: str) -> str:
    """(name, kind, x, y) each as a named dot; a name stands where it covers no other."""
    known = [p for p in points if math.isfinite(p[2]) and math.isfinite(p[3])]
    if not known:
        return ""
    left, right, upper, lower = 40.0, WIDTH - 14.0, 22.0, 206.0
    xs, ys = [p[2] for p in known], [p[3] for p in known]
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = min(0.0, *ys), (max(ys) * 1.06 or 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x_low) / (x_high - x_low) * (right - left), lower - (y - y_low) / (y_high - y_low) * (lower - upper)

    body = _frame(ticks(y_low, y_high), lambda v: at(x_low, v)[1], left, right)
    body += [text(at(v, 0)[0], lower + 15, shown(v), anchor="middle", cls="tick") for v in ticks(x_low, x_high)]
    body += [text((left + right) / 2, lower + 31, x_label, anchor="middle", cls="tick"), text(2, 11, y_label, cls="tick")]
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in (at(p[2], p[3]) for p in known)]
    names = []
    for name, kind, x, y in sorted(known, key=lambda p: -p[3]):
        px, py = at(x, y)
        body.append(f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{escape(name)}: {shown(x)}, {y:.4f}</title></circle>')
        wide = 6.1 * len(name)
        for dx, dy, anchor in (
            (7, 4, "start"),
            (-7, 4, "end"),
            (0, -8, "middle"),
            (0, 16, "middle"),
            (7, -7, "start"),
            (7, 15, "start"),
            (-7, -7, "end"),
            (-7, 15, "end"),
        ):
            start = px + dx - (wide if anchor == "end" else wide / 2 if anchor == "middle" else 0)
            box = (start, py + dy - 9, start + wide, py + dy + 2)
            free = all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken)
            if free and box[0] >= 2 and box[2] <= WIDTH - 1 and box[1] >= 12 and box[3] <= lower + 2:
                taken.append(box)
                names.append(text(px + dx, py + dy, name, anchor=anchor, cls=f"label {kind}"))
                break
    return svg(lower + 38, title, "; ".join(f"{n} {shown(x)}, {y:.4f}" for n, _, x, y in known), body + names)


def _widened(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 0.1
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


def waterfall(title: str, kept: Mapping[str, float]) -> str:
    """What is still there after each stage, as bars, with what each lost hatched on top."""
    steps = [("sought", 1.0), *((n, v) for n, v in kept.items() if v is not None and math.isfinite(v))]
    if len(steps) < 2:
        return ""
    left, right, upper, lower = 34.0, WIDTH - 8.0, 20.0, 190.0
    slot = (right - left) / len(steps)
    y = lambda v: lower - v * (lower - upper)  # noqa: E731
    body = _frame([0, 0.25, 0.5, 0.75, 1.0], y, left, right)
    before = 1.0
    for i, (name, value) in enumerate(steps):
        x = left + i * slot + slot * 0.14
        body.append(
            f'<rect class="stage" x="{x:.1f}" y="{y(value):.1f}" width="{slot * 0.72:.1f}" height="{max(lower - y(value), 0.5):.1f}"/>'
        )
        if before > value:
            body.append(
                f'<rect class="lost" x="{x:.1f}" y="{y(before):.1f}" width="{slot * 0.72:.1f}" height="{y(value) - y(before):.1f}"/>'
            )
        body.append(text(x + slot * 0.36, y(max(before, value)) - 5, f"{value:.3f}", anchor="middle", cls="num"))
        body.append(text(x + slot * 0.36, lower + 15, name, anchor="middle"))
        if before > value:
            body.append(text(x + slot * 0.36, lower + 30, f"−{before - value:.3f}", anchor="middle", cls="tick"))
        before = value
    return svg(lower + 36, title, "; ".join(f"after {n} {v:.3f}" for n, v in steps[1:]), body)


def small_bars(name: str, kind: str, values: Sequence[float | None], top: float, labels: Sequence[str]) -> str:
    """One row's bars over bins, on the scale 0..top that all its neighbours share."""
    width, lower, upper = 150.0, 88.0, 30.0
    slot = (width - 4) / max(len(values), 1)
    body = [text(2, 11, name, cls=f"label {kind}"), f'<line class="zero" x1="2" x2="{width - 2}" y1="{lower}" y2="{lower}"/>']
    for i, value in enumerate(values):
        if value is None or not math.isfinite(value):
            continue
        tall = value / (top or 1) * (lower - upper)
        x = 2 + i * slot
        body.append(f'<rect class="{kind}" x="{x + 1:.1f}" y="{lower - tall:.1f}" width="{slot - 2:.1f}" height="{max(tall, 0.5):.1f}"/>')
        body.append(
            text(x + slot / 2, lower - tall - 3, f"{value:.2f}".lstrip("0") if value < 1 else f"{value:.2f}", anchor="middle", cls="tiny")
        )
    body += [text(2 + i * slot + slot / 2, lower + 10, label, anchor="middle", cls="tiny") for i, label in enumerate(labels)]
    said = "; ".join(f"{label}: {'none' if v is None else f'{v:.4f}'}" for label, v in zip(labels, values, strict=True))
    return svg(lower + 13, name, said, body, width=width)
