"""Time per image over PSNR as a picture, and its rows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from click import UsageError
from image_rows import group_of, text_of
from results_page import of_images
from scatter_plot import scatter_plot

REPORT = {
    "model": "zoo:tiny",
    "rows": [
        {"name": "float32-eager", "batch_size": 8, "seconds_per_image": 0.4, "psnr_db": None},
        {"name": "int8 & more", "batch_size": 8, "seconds_per_image": 0.1, "psnr_db": 38.04},
        {"name": "int8-reuse", "batch_size": 8, "seconds_per_image": 0.05, "psnr_db": 33.5},
        {"name": "int8-reuse", "batch_size": 1, "seconds_per_image": 0.09, "psnr_db": 33.5},
    ],
}


def test_faster_lies_further_left_and_nearer_lies_higher():
    text = scatter_plot({"slow": (0.4, None), "fast": (0.1, 38.0), "less": (0.05, 33.5)}, "s", "dB")
    ElementTree.fromstring(text)
    marks = re.findall(r"translate\(([\d.]+) ([\d.]+)\).*?<title>(\w+):", text)
    places = {name: (float(x), float(y)) for x, y, name in marks}
    assert places["less"][0] < places["fast"][0] < places["slow"][0]
    assert places["slow"][1] < places["fast"][1] < places["less"][1]


def test_labels_do_not_lie_over_each_other():
    points = {f"row {n}": (0.1 + 0.01 * n, 38.0) for n in range(8)}
    found = re.findall(r'<text x="576" y="([\d.]+)">', scatter_plot(points, "s", "dB"))
    heights = sorted(map(float, found))
    assert len(heights) == 8
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 13.9


def test_a_report_becomes_rows_that_the_page_is_drawn_from():
    group = group_of(REPORT, 8, "note.md", "qncd bench --image")
    assert [row["image_seconds"] for row in group["rows"]] == [[0.4, 0.4], [0.4, 0.1], [0.4, 0.05]]
    tables, plots = of_images(group["rows"])
    assert "| int8-reuse | 50.0 | 8.00 | 33.5 |" in tables["images"]
    assert "int8 &amp; more" in plots["images"]
    assert of_images([{"row": "of a call", "speedup": 2.0}]) == ({}, {})
    assert '"note": "note.md"' in text_of([group])
    with pytest.raises(UsageError, match="batch 4"):
        group_of(REPORT, 4, "note.md", "")
