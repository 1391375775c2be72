"""A line chart as inline SVG: no plotting library, no script; for browsers and for paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 48  # margins for the axes and their names
LEGEND_ROW = 20
TICKS = 6  # about as many on either axis
# Okabe and Ito's colours: told apart by colour-blind readers; dashes do so in black and white
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("none", "7 3", "2 3", "9 3 2 3")


def line_chart(curves: Mapping[str, Sequence[float | None]], x_name: str, y_name: str) -> str:
    """curves: name -> values at steps 1, 2, ...; the points that are not finite leave a gap.

    Returns an <svg> element with axes, ticks, one line with points per curve, and a legend.
    """
    shown = {name: [_finite(value) for value in values] for name, values in curves.items()}
    finite = [value for values in shown.values() for value in values if value is not None]
    steps = max((len(values) for values in shown.values()), default=0)
    y_ticks = nice_ticks(min(finite, default=0.0), max(finite, default=1.0))
    low, high = y_ticks[0], y_ticks[-1]

    def x(step: int) -> float:
        span = WIDTH - LEFT - RIGHT
        return LEFT + (span * (step - 1) / (steps - 1) if steps > 1 else span / 2)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = _axes(x, y, _step_ticks(steps), y_ticks, x_name, y_name)
    for index, (name, values) in enumerate(shown.items()):
        stroke = _stroke(index)
        for run in _runs(values):
            points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in run)
            parts.append(f'<polyline points="{points}" fill="none" stroke-width="2" {stroke}/>')
            parts += [
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" '
                f'fill="{COLORS[index % len(COLORS)]}">'
                f"<title>{escape(name)}, step {step}: {value:.2f}</title></circle>"
                for step, value in run
            ]
        parts.append(_legend(index, name, values))
    height = HEIGHT + LEGEND_ROW * len(shown)
    label = escape(f"{y_name} over {x_name}", quote=True)
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>'


def nice_ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers, 1, 2 or 5 times a power of ten apart, that enclose the range."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1.0):
        low, high = low - 1, high + 1
    raw = (high - low) / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _step_ticks(steps: int) -> list[int]:
    if steps < 1:
        return []
    stride = max(1, round(steps / TICKS / 5) * 5 if steps > 4 * TICKS else math.ceil(steps / TICKS))
    return sorted({1, *range(stride, steps + 1, stride)})


def _axes(
    x: Callable[[int], float],
    y: Callable[[float], float],
    x_ticks: Sequence[int],
    y_ticks: Sequence[float],
    x_name: str,
    y_name: str,
) -> list[str]:
    """Grid lines, tick numbers, names of the axes."""
    bottom = HEIGHT - BOTTOM
    grid, text = 'stroke="#d8dee4"', 'font-size="12" fill="#57606a"'
    parts = []
    for tick in y_ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" {grid}/>'
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" {text}>{tick:g}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{bottom}" y2="{bottom + 5}" '
            f'stroke="#8c959f"/><text x="{x(tick):.1f}" y="{bottom + 19}" text-anchor="middle" '
            f"{text}>{tick}</text>"
        )
    middle = (TOP + bottom) / 2
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="#8c959f"/>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" '
        f"{text}>{escape(x_name)}</text>"
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle" '
        f"{text}>{escape(y_name)}</text>"
    )
    return parts


def _legend(index: int, name: str, values: Sequence[float | None]) -> str:
    y = HEIGHT + LEGEND_ROW * index + 10
    missing = sum(value is None for value in values)
    note = f" ({missing} of {len(values)} steps infinite or missing)" if missing else ""
    return (
        f'<line x1="{LEFT}" x2="{LEFT + 34}" y1="{y}" y2="{y}" stroke-width="2" {_stroke(index)}/>'
        f'<text x="{LEFT + 42}" y="{y + 4}" font-size="13">{escape(name + note)}</text>'
    )


def _stroke(index: int) -> str:
    color, dash = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
    return f'stroke="{color}" stroke-dasharray="{dash}"'


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Unbroken stretches of (step, value), steps counted from 1."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in enumerate(values, start=1):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
