"""A plot of labelled rows, each with a dot for every series, as SVG: for pages on white."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from qncd_cli.report.charts import COLORS, nice_ticks

Rows = Mapping[str, Mapping[str, float | None]]

WIDTH, LEFT, RIGHT = 760, 210, 60
"""Of the picture, and beside the axis; in pixels, as all lengths here."""
TOP, ROW, BOTTOM = 44, 24, 50
MARKS = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "M-5-5h10v10h-10z",
    "M0-6l6 6-6 6-6-6z",
    "M0-6l6 11h-12z",
)
"""Circle, square, diamond, triangle: series are told apart without their colours, too."""
STYLE = "text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2933; }"


def dot_plot(rows: Rows, x_name: str, *, log: bool = False, values: bool = False) -> str:
    """rows: label -> series -> value, None where nothing was measured; log: of the axis, for values
    above 0; values: numbers beside the dots. Returns an SVG document."""
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    measured = [v for row in rows.values() for v in row.values() if v is not None]
    ticks = decades(measured) if log else nice_ticks(min(0.0, *measured), max(measured))
    scale = math.log10 if log else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    bottom = TOP + ROW * len(rows)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(value) - low) / (high - low)

    parts = [_legend(series), *(_tick(x(tick), f"{tick:g}", bottom) for tick in ticks)]
    for index, (label, row) in enumerate(rows.items()):
        y = TOP + ROW * (index + 0.5)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#eaeef2"/>')
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        for name, value in row.items():
            if value is not None:
                said = f"{label}, {name}: {value:g}"
                parts.append(mark(x(value), y, series.index(name), said))
                if values:
                    parts.append(f'<text x="{x(value) + 10:.1f}" y="{y + 4:.1f}">{value:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 38}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
    )
    size = f'width="{WIDTH}" height="{bottom + BOTTOM}" viewBox="0 0 {WIDTH} {bottom + BOTTOM}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><title>{escape(x_name)}</title>'
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", white, *parts, "</svg>"]) + "\n"


def decades(values: Sequence[float]) -> list[float]:
    """Powers of ten that enclose the values."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _tick(x: float, text: str, bottom: float) -> str:
    return (
        f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#d8dee4"/>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
    )


def mark(x: float, y: float, index: int, said: str) -> str:
    shape = f'd="{MARKS[index % len(MARKS)]}" fill="{COLORS[index % len(COLORS)]}"'
    place = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path {shape} {place} opacity="0.85"><title>{escape(said)}</title></path>'


def _legend(series: Sequence[str]) -> str:
    """Marks and names above the rows; nothing where there is one series."""
    if len(series) < 2:
        return ""
    step = (WIDTH - LEFT - RIGHT) / len(series)
    places = [(LEFT + step * index + 6, name) for index, name in enumerate(series)]
    return "".join(
        f'{mark(x, 20, index, name)}<text x="{x + 12:.1f}" y="24">{escape(name)}</text>'
        for index, (x, name) in enumerate(places)
    )
