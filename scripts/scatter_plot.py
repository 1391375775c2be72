"""A plot of labelled points in two numbers, as SVG: for pages on white."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from dot_plot import STYLE, decades, mark

from qncd_cli.report.charts import nice_ticks

Points = Mapping[str, tuple[float, float | None]]

WIDTH, HEIGHT = 760, 420
"""The picture in pixels, as all lengths here."""
LEFT, RIGHT, TOP, BOTTOM = 64, 210, 24, 56
"""Room around the axes."""
LINE = 14
"""Least distance between two labels, from top to bottom."""


def scatter_plot(points: Points, x_name: str, y_name: str) -> str:
    """points: label -> x, above 0 and on an axis of decades, and y; None for y stands at the top,
    beyond all numbers. Returns an SVG document."""
    ticks = decades([x for x, _ in points.values()])
    known = [y for _, y in points.values() if y is not None]
    heights = nice_ticks(min(0.0, *known), max(known)) if known else [0.0, 1.0]
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(value: float) -> float:
        return LEFT + (right - LEFT) * (math.log10(value) - low) / (high - low)

    def height(value: float | None) -> float:
        if value is None:
            return TOP
        share = (value - heights[0]) / (heights[-1] - heights[0])
        return bottom - (bottom - TOP - LINE) * share

    parts = [
        f'<path d="M{place(tick):.1f} {TOP}V{bottom}" stroke="#d8dee4"/>'
        f'<text x="{place(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    ]
    for value in heights:
        y = height(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#eaeef2"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts += _marks({label: (place(x), height(y)) for label, (x, y) in points.items()}, points)
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts.append(
        f'<text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>"
    )
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    title = f"<title>{escape(y_name)} over {escape(x_name)}</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{title}'
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", white, *parts, "</svg>"]) + "\n"


def _marks(places: Mapping[str, tuple[float, float]], points: Points) -> list[str]:
    """A mark for every point, labels beside them in a column of their own, none over another."""
    found, column, last = [], WIDTH - RIGHT + 26, -math.inf
    by_height = sorted(places.items(), key=lambda item: item[1][1])
    for index, (label, (x, y)) in enumerate(by_height):
        last = max(y, last + LINE)
        seconds, decibels = points[label]
        said = f"{label}: {seconds:.3g}, {'same' if decibels is None else f'{decibels:.1f}'}"
        found.append(
            f'<path d="M{x:.1f} {y:.1f}L{column - 6} {last:.1f}" stroke="#d8dee4" fill="none"/>'
        )
        found.append(mark(x, y, index, said))
        found.append(f'<text x="{column}" y="{last + 4:.1f}">{escape(label)}</text>')
    return found
