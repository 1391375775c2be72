"""Charts as inline SVG that follows the page: its colours in the light and the dark, its font.

Drawn here and not by a plotting library: matplotlib's SVG of one line chart takes 16 kB with its
text as text (31 kB as paths; here 6 kB), has fixed colours, which a page in the dark cannot change,
no titles at its points, and brings seven more packages. What is here are two axes and three marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

from ..vocabulary import number
from .rendering import part

WIDTH, HEIGHT = 440, 264
"""Units of a chart; on a phone of 390 pixels a unit is 0.8 pixels, so that text stays readable."""
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 28, 42  # margins for the axes and their names
TICKS = 6  # about as many on either axis
# Okabe and Ito's colours: told apart by colour-blind readers; dashes do so in black and white
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
BINS = 20
"""Bars of a histogram, at most; more are empty in sets of some dozen images."""
LETTER, LINE = 7.0, 13.0
"""Units of a letter and of a line of names in a scatter."""
LABELLED = 12
"""Points of a scatter that are named beside them; more would lie on each other."""

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Curve:
    """One curve: unbroken stretches of points in units of the chart, and what stands beside it."""

    name: str
    note: str
    dash: str
    runs: Sequence[Sequence[tuple[float, float, str]]]


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram, in units of the chart. strong: whether it stands out."""

    x: float
    y: float
    width: float
    height: float
    title: str
    strong: bool


@dataclass(frozen=True)
class Point:
    """One named point. anchor: of its name, start or end; name_y: where the name stands."""

    x: float
    y: float
    series: int
    name: str
    title: str
    anchor: str
    name_y: float

    @property
    def name_spans(self) -> tuple[float, float]:
        """Where the name begins and ends, about."""
        width = LETTER * len(self.name)
        return (self.x, self.x + width) if self.anchor == "start" else (self.x - width, self.x)


@dataclass(frozen=True)
class Frame:
    """Axes: ticks as (position, text)."""

    x_name: str
    y_name: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    label: str


@dataclass(frozen=True)
class Table:
    """The numbers of a chart, for whoever cannot see it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)


def line_chart(
    curves: Mapping[str, Sequence[float | None]],
    x_name: str,
    y_name: str,
    *,
    xs: Sequence[float] = (),
    log: bool = False,
    dots: bool = True,
) -> Markup:
    """curves: name -> values at steps 1, 2, ..., or at xs; those that are not finite leave a gap.

    log: of the values, those of 0 and less leave a gap as well. dots: at every point, with its
    number as a title. Returns a figure with a legend, and the numbers in a table.
    """
    shown = {name: [_shown(value, log) for value in values] for name, values in curves.items()}
    finite = [value for values in shown.values() for value in values if value is not None]
    count = max((len(values) for values in shown.values()), default=0)
    at = list(xs) or list(range(1, count + 1))
    y_ticks = (
        _decades(finite) if log else nice_ticks(min(finite, default=0), max(finite, default=1))
    )
    x = _scale(min(at, default=0), max(at, default=1), LEFT, WIDTH - RIGHT)
    y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, log=log)
    inside = [t for t in nice_ticks(at[0], at[-1]) if at[0] <= t <= at[-1]] if xs else []
    x_ticks = inside or [float(t) for t in _step_ticks(count)]
    made = [
        Curve(
            name,
            _note(values),
            DASHES[index % len(DASHES)],
            [
                [(x(at[i]), y(v), f"{name}, {at[i]:g}: {number(v)}") for i, v in run]
                for run in _runs(values)
            ],
        )
        for index, (name, values) in enumerate(shown.items())
    ]
    rows = [
        [f"{at[i]:g}", *(number(v[i] if i < len(v) else None) for v in curves.values())]
        for i in range(count)
    ]
    frame = Frame(
        x_name,
        y_name,
        [(x(t), f"{t:g}") for t in x_ticks],
        [(y(t), f"{t:g}") for t in y_ticks],
        f"{y_name} over {x_name}, {_extent(finite)}",
    )
    table = Table([x_name, *curves], rows)
    return _figure(frame, curves=made, table=table, dots=dots)


def histogram(values: Sequence[float], x_name: str, y_name: str, below: float) -> Markup:
    """How many of the values lie where; bars of values under `below` stand out.

    values: finite, at least one. The bars' edges are round numbers.
    """
    edges = _edges(min(values), max(values))
    counts = [0] * (len(edges) - 1)
    step = edges[1] - edges[0]
    for value in values:
        counts[min(max(int((value - edges[0]) / step), 0), len(counts) - 1)] += 1
    y_ticks = [t for t in nice_ticks(0, max(counts)) if t == int(t)]
    x = _scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y = _scale(0, y_ticks[-1], HEIGHT - BOTTOM, TOP)
    bars = [
        Bar(
            x(left) + 0.5,
            y(count),
            x(right) - x(left) - 1,
            y(0) - y(count),
            f"{number(left)} to {number(right)}: {count}",
            right <= below,
        )
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    ticks = [t for t in nice_ticks(edges[0], edges[-1]) if edges[0] <= t <= edges[-1]]
    frame = Frame(
        x_name,
        y_name,
        [(x(t), f"{t:g}") for t in ticks],
        [(y(t), f"{t:g}") for t in y_ticks],
        f"{y_name} over {x_name}: {len(values)} values, {_extent(values)}",
    )
    rows = [
        [f"{number(left)} to {number(right)}", number(count)]
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    return _figure(frame, bars=bars, table=Table([x_name, y_name], rows))


def scatter(points: Sequence[tuple[str, float, float, int]], x_name: str, y_name: str) -> Markup:
    """points: name, x, y, and the number of the series; named beside them where they are few."""
    xs, ys = [point[1] for point in points], [point[2] for point in points]
    x_ticks, y_ticks = (nice_ticks(min(v, default=0), max(v, default=1)) for v in (xs, ys))
    x = _scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    made: list[Point] = []
    for name, a, b, series in sorted(points, key=lambda point: -point[2]):
        text = name if len(points) <= LABELLED else ""
        anchor = "end" if x(a) > WIDTH * 0.6 else "start"
        title = f"{name}: {number(a)}, {number(b)}"
        point = Point(x(a), y(b), series, text, title, anchor, y(b))
        made.append(replace(point, name_y=_free(point, made)))
    frame = Frame(
        x_name,
        y_name,
        [(x(t), f"{t:g}") for t in x_ticks],
        [(y(t), f"{t:g}") for t in y_ticks],
        f"{y_name} over {x_name}: {len(points)} points",
    )
    rows = [[name, number(a), number(b)] for name, a, b, _ in points]
    return _figure(frame, points=made, table=Table(["", x_name, y_name], rows))


def _free(point: Point, placed: Sequence[Point]) -> float:
    """A height for the point's name below all names that it would lie on."""
    place = point.y
    left, right = point.name_spans
    for other in placed:
        a, b = other.name_spans
        if left < b and a < right and abs(place - other.name_y) < LINE:
            place = other.name_y + LINE
    return place


def _figure(frame: Frame, **marks: Any) -> Markup:
    none: dict[str, Any] = {"curves": [], "bars": [], "points": [], "dots": False}
    box = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP}
    box["bottom"] = HEIGHT - BOTTOM
    return part("chart.html", frame=frame, box=box, **{**none, **marks})


# ------------------------------------------------------------------ axes


def nice_ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers, 1, 2 or 5 times a power of ten apart, that enclose the range."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1.0):
        low, high = low - 1, high + 1
    raw = (high - low) / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten that enclose values above 0; of two where they lie within two decades."""
    low, high = min(values, default=1.0), max(values, default=10.0)
    base = 10.0 if high > 100 * low else 2.0
    first = math.floor(math.log(low, base) + 1e-9)
    last = max(math.ceil(math.log(high, base) - 1e-9), first + 1)
    return [float(f"{base**exponent:.6g}") for exponent in range(first, last + 1)]


def _edges(low: float, high: float) -> list[float]:
    """Round numbers, equally far apart, that enclose the values; BINS steps at most."""
    spread = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(spread / BINS))
    step = next(f * power for f in (1, 2, 2.5, 5, 10, 20) if f * power * (BINS - 1) >= spread)
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9) + 1
    return [round(index * step, 10) for index in range(first, last + 1)]


def _step_ticks(steps: int) -> list[int]:
    if steps < 1:
        return []
    stride = max(1, round(steps / TICKS / 5) * 5 if steps > 4 * TICKS else math.ceil(steps / TICKS))
    return sorted({1, *range(stride, steps + 1, stride)})


def _scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Scale:
    """Values from low to high -> positions from start to end."""
    of: Scale = math.log if log else float
    a, b = of(low), of(high)

    def scaled(value: float) -> float:
        share = (of(value) - a) / (b - a) if b > a else 0.5
        return round(start + (end - start) * share, 1)

    return scaled


# ------------------------------------------------------------------ values


def _note(values: Sequence[float | None]) -> str:
    missing = sum(value is None for value in values)
    return f" ({missing} of {len(values)} steps infinite or missing)" if missing else ""


def _extent(values: Sequence[float]) -> str:
    return f"from {number(min(values))} to {number(max(values))}" if values else "no values"


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Unbroken stretches of (index, value)."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((index, value))
    return [run for run in runs if run]


def _shown(value: float | None, log: bool) -> float | None:
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return None
    return value
