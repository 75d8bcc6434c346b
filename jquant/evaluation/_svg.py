"""Three figures as SVG text, without a library: curves, labelled points, a grid of colours.

Sizes are in user units of the view box; colours come from the page's CSS variables --c0, --c1, … and
--ink, --faint, so that one stylesheet serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
COLOURS = 8


@dataclass(frozen=True)
class Axis:
    """Values from low to high, in units of length from start to stop."""

    label: str
    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies: 0 at low, 1 at high."""
        low, high, x = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value
        )  # fmt: skip
        return (x - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within the axis: powers of ten, or steps of 1, 2 or 5 times one."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, -(-(last - first) // 7))
            return [10.0**k for k in range(first, last + 1, step)]
        raw = (self.high - self.low) / 6
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spanning(label: str, values: Sequence[float], *, log: bool = False) -> Axis:
    """An axis with some room around the values; on a logarithmic one only those above zero count."""
    kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(kept), max(kept)
    if log:
        return Axis(label, low / 2, high * 2, log=True)
    room = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(label, max(low - room, 0.0) if low >= 0 else low - room, high + room)


def curves(
    names: Sequence[str], lines: Sequence[Sequence[tuple[float, float]]], x: Axis, y: Axis, title: str
) -> str:
    """One curve a name, with a legend below."""
    parts = [_axes(x, y)]
    for i, points in enumerate(lines):
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour(i)}" stroke-width="2"/>')
    legend, height = _legend(names)
    return _svg(title, HEIGHT + height, parts + legend)


def points(names: Sequence[str], found: Sequence[tuple[float, float]], x: Axis, y: Axis, title: str) -> str:
    """A dot with its name for each pair of values."""
    parts = [_axes(x, y)]
    for i, (name, (a, b)) in enumerate(zip(names, found, strict=True)):
        cx, cy = _x(x, a), _y(y, b)
        right = cx > WIDTH * 0.7
        anchor, dx = ("end", -9) if right else ("start", 9)
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{colour(i)}"/>')
        parts.append(_text(cx + dx, cy + 4, name, anchor))
    return _svg(title, HEIGHT, parts)


def grid(
    rows: Sequence[str],
    columns: int,
    values: Sequence[Sequence[float | None]],
    labels: Sequence[Sequence[str]],
    title: str,
) -> str:
    """A cell for each row and column, stronger where the value is higher; `labels` show under the pointer."""
    known = [v for row in values for v in row if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    left, size = 8 + 7 * max(map(len, rows), default=0), 18
    cell = max(min((WIDTH - left - RIGHT) / max(columns, 1), 24.0), 4.0)
    parts = []
    for r, name in enumerate(rows):
        parts.append(_text(left - 6, TOP + r * size + 13, name, "end"))
        for c, value in enumerate(values[r]):
            if value is None:
                continue
            share = 0.15 + 0.85 * (value - low) / (high - low) if high > low else 0.6
            parts.append(
                f'<rect x="{left + c * cell:.1f}" y="{TOP + r * size}" width="{cell - 1:.1f}" '
                f'height="{size - 1}" fill="{colour(0)}" fill-opacity="{share:.2f}">'
                f"<title>{escape(labels[r][c])}</title></rect>"
            )
    bottom = TOP + len(rows) * size
    step = max(1, -(-columns // 16))
    for c in range(0, columns, step):
        parts.append(_text(left + (c + 0.5) * cell, bottom + 14, str(c), "middle"))
    return _svg(title, bottom + 24, parts)


def colour(i: int) -> str:
    return f"var(--c{i % COLOURS})"


def _x(axis: Axis, value: float) -> float:
    return LEFT + min(max(axis.at(value), 0.0), 1.0) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - min(max(axis.at(value), 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)


def _axes(x: Axis, y: Axis) -> str:
    floor, parts = HEIGHT - BOTTOM, []
    for value in x.ticks():
        at = _x(x, value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}" stroke="var(--faint)"/>')
        parts.append(_text(at, floor + 16, _tick(value), "middle"))
    for value in y.ticks():
        at = _y(y, value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--faint)"/>'
        )
        parts.append(_text(LEFT - 6, at + 4, _tick(value), "end"))
    middle = (TOP + floor) / 2
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x.label, "middle"))
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y.label)}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.0e}".replace("e-0", "e-")


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Its parts and its height."""
    parts, columns, line = [], 2, 18
    for i, name in enumerate(names):
        x = LEFT + i % columns * (WIDTH - LEFT) / columns
        y = HEIGHT + 6 + i // columns * line
        parts.append(f'<rect x="{x:.0f}" y="{y - 8}" width="16" height="4" fill="{colour(i)}"/>')
        parts.append(_text(x + 22, y, name, "start"))
    return parts, -(-len(names) // columns) * line


def _text(x: float | int, y: float | int, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float | int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
