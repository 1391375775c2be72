"""Charts draw every finite value where it belongs, and say in words what they show."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from qncd_cli.report.charts import BINS, histogram, line_chart, nice_ticks, scatter


def _svg(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", figure, re.S)[0])


def _table(figure: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", figure, re.S)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_chart_draws_every_finite_point_and_leaves_gaps() -> None:
    figure = line_chart({"a": [1.0, 2.0, math.inf, 4.0, 3.0], "b": [5.0, math.nan]}, "step", "dB")
    svg = _svg(figure)
    assert len(svg.findall("circle")) == 5 and len(svg.findall("polyline")) == 3
    points = svg.findall("polyline")[0].get("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] > heights[1]  # larger values lie higher
    assert "1 of 5 steps" in figure
    assert _table(figure)[3] == ["3", "identical", "–"]


def test_a_logarithmic_chart_spaces_ratios_equally_and_leaves_out_zero() -> None:
    svg = _svg(line_chart({"a": [1.0, 10.0, 0.0, 1000.0]}, "x", "y", log=True))
    heights = [float(circle.get("cy")) for circle in svg.findall("circle")]
    assert len(heights) == 3
    assert 2 * (heights[0] - heights[1]) == pytest.approx(heights[1] - heights[2], abs=0.2)


@pytest.mark.parametrize(
    "curves", [{}, {"a": []}, {"a": [math.inf]}, {"a": [2.0]}, {"a": [3.0] * 9}]
)
@pytest.mark.parametrize("log", [False, True])
def test_chart_of_degenerate_curves_is_valid(curves, log) -> None:
    figure = line_chart(curves, "step", "dB", log=log)
    svg = re.search(r"<svg.*?</svg>", figure, re.S)[0]
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf " not in svg


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 47.1), (16.9, 17.3), (5, 5), (0, 0), (-1e6, 1e6), (1e-5, 2e-5)]
)
def test_ticks_are_few_round_and_enclose_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    "values", [[5.0], [16.49, 20.0, 20.0, 37.3], [-3.0, 0.0, 151.0], [1.0, 1.0000001]]
)
def test_a_histogram_counts_every_value_once(values) -> None:
    figure = histogram(values, "PSNR, dB", "images", 20.0)
    counts = [int(row[1]) for row in _table(figure)[1:]]
    assert sum(counts) == len(values)
    assert len(_svg(figure).findall("rect")) == len(counts) <= BINS


def test_bars_below_the_bound_stand_out() -> None:
    bars = _svg(histogram([10.0, 12.0, 30.0, 31.0], "x", "y", 20.0)).findall("rect")
    assert {bar.get("class") for bar in bars[:1]} == {"s1"} and bars[-1].get("class") == "s0"


def test_a_scatter_names_its_points_where_they_are_few() -> None:
    few = _svg(scatter([("best W4A8", 6.0, 40.0, 0), ("minmax W4A8", 5.0, 20.0, 1)], "MB", "dB"))
    texts = [text.text for text in few.findall("text")]
    assert "best W4A8" in texts and "minmax W4A8" in texts
    one, other = few.findall("circle")
    assert float(one.get("cx")) > float(other.get("cx"))
    assert float(one.get("cy")) < float(other.get("cy"))
    many = scatter([(f"row {i}", float(i), 1.0, 0) for i in range(30)], "MB", "dB")
    assert "row 7" not in [text.text for text in _svg(many).findall("text")]
    assert ["row 7", "7.000", "1.000"] in _table(many)
