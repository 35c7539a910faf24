"""Small SVG figures for the report: bars with their spread, lines over numbers, points with names, one stacked bar.

A figure is 400 units wide, about what a phone shows, so its text keeps its size. Colours are classes (``c0`` .. ``c7``)
and ``currentColor``, which the page's style sets for light and dark. Each mark carries its number as ``data-value``, and
a title that says it in words.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 400
COLOURS = 8


def safe(text: object) -> str:
    """Text that may stand in HTML and XML: escaped, what neither may hold replaced."""
    kept = "".join(c if c in "\n\t" or 32 <= ord(c) < 127 or 160 <= ord(c) < 0xD800 or 0xE000 <= ord(c) not in (0xFFFE, 0xFFFF)
                   else "\ufffd" for c in str(text))  # fmt: skip
    return html.escape(kept)


def short(value: float) -> str:
    """Three digits, never fewer than what stands before the point."""
    size = abs(value)
    return (
        f"{value:.0f}"
        if size >= 100
        else f"{value:.1f}"
        if size >= 10
        else f"{value:.2f}"
        if size >= 0.01
        else f"{value:.2g}"
    )


@dataclass(frozen=True)
class Bar:
    """``limit`` is drawn as a mark: the least that the machine allows. ``dim``: somebody else's."""

    label: str
    value: float
    text: str  # beside the label
    title: str
    p10: float | None = None
    p90: float | None = None
    limit: float | None = None
    dim: bool = False
    colour: int = 0


def bars(rows: Sequence[Bar], alt: str) -> str:
    """A bar below each name, all from zero."""
    top = max([max(r.value, r.p90 or 0.0) for r in rows] or [1.0]) or 1.0
    parts, y = [], 0
    for r in rows:
        width = max(1.0, (WIDTH - 2) * r.value / top)
        kind = f"c{r.colour % COLOURS}" + (" dim" if r.dim else "")
        mark = f'<text x="0" y="{y + 13}">{safe(r.label)}</text><text x="{WIDTH}" y="{y + 13}" class="end">{safe(r.text)}</text>'
        mark += f'<rect class="{kind}" x="0" y="{y + 19}" width="{width:.1f}" height="11" rx="1.5" data-value="{r.value!r}"/>'
        if r.p10 is not None and r.p90 is not None:
            x0, x1 = ((WIDTH - 2) * v / top for v in (r.p10, r.p90))
            mark += f'<path class="whisker" d="M{x0:.1f} {y + 24.5}H{x1:.1f}M{x0:.1f} {y + 22}v5M{x1:.1f} {y + 22}v5"/>'
        if r.limit is not None:
            x = (WIDTH - 2) * min(r.limit, top) / top
            mark += f'<path class="limit" d="M{x:.1f} {y + 17}v15" data-limit="{r.limit!r}"/>'
        parts.append(f"<g>{mark}<title>{safe(r.title)}</title></g>")
        y += 40
    return _svg(y, alt, "".join(parts))


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    title: str
    label: str = ""


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """``ticks`` are shown as they are; ``log`` wants positive values."""

    name: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high one; values beyond are put at the end."""
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return min(1.04, max(-0.04, (at - low) / ((high - low) or 1.0)))

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:g}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` or a little below to ``high`` or a little above."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if span / (step * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 36
HEIGHT = 250


def chart(
    lines: Sequence[Line], x: Axis, y: Axis, alt: str, *, joined: bool = True, reference: float | None = None
) -> str:
    """Lines (or points alone) in a frame; ``reference`` is a horizontal rule."""

    def at(px: float, py: float) -> tuple[float, float]:
        return (
            LEFT + x.place(px) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y.place(py) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in y.ticks:
        _, py = at(x.low, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 5}" y="{py + 4:.1f}">{safe(y.text(tick))}</text>')
    for tick in x.ticks:
        px, _ = at(tick, y.low)
        parts.append(f'<path class="grid" d="M{px:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick middle" x="{px:.1f}" y="{HEIGHT - BOTTOM + 15}">{safe(x.text(tick))}</text>')
    parts.append(f'<text class="tick middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">{safe(x.name)}</text>')
    if reference is not None:
        _, py = at(x.low, reference)
        parts.append(f'<path class="reference" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
    for line in lines:
        places = [at(p.x, p.y) for p in line.points]
        kind = f"l{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
        if joined and len(places) > 1:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
            parts.append(f'<path class="line {kind}" d="M{path}"/>')
        for p, (px, py) in zip(line.points, places, strict=True):
            mark = f'<circle class="c{line.colour % COLOURS}" cx="{px:.1f}" cy="{py:.1f}" r="{3 if joined else 5}" data-x="{p.x!r}" data-value="{p.y!r}"/>'
            if p.label:
                right = px < WIDTH * 0.62
                mark += f'<text class="name{"" if right else " end"}" x="{px + (8 if right else -8):.1f}" y="{py + 4:.1f}">{safe(p.label)}</text>'
            parts.append(f"<g>{mark}<title>{safe(p.title)}</title></g>")
    return _svg(HEIGHT, alt, "".join(parts))


def stacked(parts: Sequence[tuple[str, float, str]], alt: str) -> str:
    """One bar in its parts: name, size, words about it."""
    total = sum(size for _, size, _ in parts) or 1.0
    found, left = [], 0.0
    for i, (_, size, title) in enumerate(parts):
        width = WIDTH * size / total
        mark = f'<rect class="c{i % COLOURS}" x="{left:.2f}" y="0" width="{max(0.0, width - 0.7):.2f}" height="30" data-value="{size!r}"/>'
        if width > 34:
            mark += f'<text class="inside middle" x="{left + width / 2:.1f}" y="19">{size / total:.0%}</text>'
        found.append(f"<g>{mark}<title>{safe(title)}</title></g>")
        left += width
    return _svg(30, alt, "".join(found))


def legend(names: Sequence[tuple[str, int, bool]]) -> str:
    """Names with their colours; the third says dashed."""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line l{colour % COLOURS}{" dashed" if dashed else ""}" '
        f'd="M0 4H22"/></svg>{safe(name)}</li>'
        for name, colour, dashed in names
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(height: float, alt: str, inside: str) -> str:
    return f'<svg class="figure" viewBox="-2 -2 {WIDTH + 4} {height + 4}" role="img" aria-label="{safe(alt)}">{inside}</svg>'
