"""The report is self-contained, escaped and readable; tables and sheets have the right layout."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from qncd_cli.report.curve import line_chart, nice_ticks
from qncd_cli.report.page import contact_sheet, html_report, markdown_table

DISTANCE = {"network": "fashion-classifier", "name": "fd_fashion", "value": 1.25}
METRICS = {
    "protocol": {"num_samples": 500, "steps": 20},
    "full": {"feature_distance": {**DISTANCE, "low": 1.1, "high": 1.4}, "fid": None},
    "quantized": {"feature_distance": {**DISTANCE, "value": 1.5, "low": None, "high": None}},
    "fidelity": {"psnr_db": math.inf, "sqnr_latents_db": 17.26, "sqnr_steps_db": [1.0]},
    "bytes": {"full": 44_000_000, "quantized": 7_000_000},
}


class _Balance(HTMLParser):
    """Collects tags that are left open or closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def _image(seed: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, 8, 6), dtype=torch.uint8, generator=generator)


def _text(html: str) -> str:
    return re.sub(r"<[^>]*>", " ", html.split("</head>")[1])


def test_report_is_well_formed_and_needs_no_other_file() -> None:
    curves = {"W4A8": [20.0, 18.5, 17.0], "W4A6": [19.0, math.inf, None]}
    html = html_report(
        METRICS, curves, {"Pairs": [("seed 0", _image(0), _image(1))]}, "Report", {"a": 1}
    )
    page = _Balance()
    page.feed(html)
    assert not page.open and page.tags.count("img") == 2 and page.tags.count("svg") == 1
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|@import|url\(|<script""", html)


def test_report_shows_the_numbers() -> None:
    text = _text(html_report(METRICS, {}, {}, "Report", {"model": "zoo:fashion-ldm"}))
    for expected in ("fd_fashion", "1.250", "[1.100, 1.400]", "17.26", "identical", "–"):
        assert expected in text
    for expected in ("44.00", "7.000", "15.9 %", "zoo:fashion-ldm", "steps"):
        assert expected in text
    assert "FID" not in text  # nothing measured it


def test_report_shows_a_real_fid_once_and_under_its_name() -> None:
    entry = {"network": "inception-v3-compat", "name": "fid", "value": 9.48}
    found = {"feature_distance": entry, "fid": 9.48, "kernel_distance": entry, "kid": 9.48}
    html = html_report({"full": found, "fidelity": {"feature_distance": entry}}, {}, {}, "t", {})
    assert html.count("FID ↓") == html.count("KID ↓") == 1 and html.count("9.480") == 3
    assert "distance to data" not in html


def test_report_says_first_what_was_measured_and_folds_the_protocol() -> None:
    meta = {"bits": "W4A8 (5.9 / 9.1)", "preset": "best", "CPU": "a CPU", "command": "qncd eval"}
    html = html_report(METRICS, {}, {}, "fashion-ldm, W4A8", meta)
    before, _, after = html.partition("<details>")
    assert "<title>fashion-ldm, W4A8</title>" in html
    for key, value in meta.items():
        assert f"<dt>{key}</dt><dd>{value}</dd>" in before
    assert "num_samples" in after and "num_samples" not in before


def test_no_table_of_a_report_is_wider_than_a_phone() -> None:
    """Three columns at most, intervals below their numbers, and wider tables as blocks."""
    html = html_report(METRICS, {"a": [1.0, 2.0]}, {}, "t", {})
    assert html.count("<th ") == 3 and '<div class="chart"><svg' in html
    narrow = html.partition("@media (max-width: 40rem) {")[2].partition("</style>")[0]
    for rule in (".range { display: block; }", ".wide thead { display: none; }", "attr(data-name)"):
        assert rule in narrow


def test_report_of_one_set_has_no_fidelity_column() -> None:
    metrics = {"images": {"fid": 12.5, "precision": 0.7, "kid": None}, "protocol": {}}
    html = html_report(metrics, {}, {}, "One set", {})
    assert "FID" in html and "12.50" in html and html.count("<th ") == 2  # no column but the set's
    assert html_report({}, {}, {}, "Nothing", {}).count("<table") == 0


def test_report_escapes_what_comes_from_outside() -> None:
    bad = '<script>alert("x")</script>&'
    metrics = {
        "images": {"feature_distance": {"network": bad, "value": 1.0}},
        "protocol": {bad: bad},
    }
    html = html_report(
        metrics, {bad: [1.0, 2.0]}, {"Pairs": [(bad, _image(0), _image(0))]}, bad, {bad: [bad]}
    )
    assert "<script" not in html and 'alert("x")' not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize("channels", [1, 3])
def test_report_images_survive_the_round_trip(channels: int) -> None:
    full, quantized = _image(0, channels), _image(1, channels)
    html = html_report({}, {}, {"Pairs": [("s", full, quantized)]}, "t", {})
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    for uri, image in zip(uris, (full, quantized), strict=True):
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(uri))))
        assert (pixels == image.expand(3, -1, -1).permute(1, 2, 0).numpy()).all()


def test_chart_draws_every_finite_point_and_leaves_gaps() -> None:
    svg = ElementTree.fromstring(
        line_chart({"a": [1.0, 2.0, math.inf, 4.0, 3.0], "b": [5.0, math.nan]}, "step", "dB")
    )
    assert len(svg.findall("circle")) == 5 and len(svg.findall("polyline")) == 3
    points = svg.findall("polyline")[0].get("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] > heights[1]  # larger values lie higher
    assert "1 of 5 steps" in "".join(svg.itertext())


@pytest.mark.parametrize(
    "curves", [{}, {"a": []}, {"a": [math.inf]}, {"a": [2.0]}, {"a": [3.0] * 9}]
)
def test_chart_of_degenerate_curves_is_valid(curves) -> None:
    svg = line_chart(curves, "step", "dB")
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf " not in svg


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 47.1), (16.9, 17.3), (5, 5), (0, 0), (-1e6, 1e6), (1e-5, 2e-5)]
)
def test_ticks_are_few_round_and_enclose_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


def test_markdown_table() -> None:
    rows = [{"preset": "a|b", "psnr_db": 27.4}, {"preset": "qncd\nx", "psnr_db": None}]
    assert markdown_table(rows, ["preset", "psnr_db"]).splitlines() == [
        "| preset | psnr_db |",
        "| --- | ---: |",
        "| a\\|b | 27.40 |",
        "| qncd x | – |",
    ]


def test_contact_sheet_places_every_image() -> None:
    images = torch.stack([torch.full((3, 4, 5), 40 * i, dtype=torch.uint8) for i in range(5)])
    sheet = np.array(contact_sheet(images, columns=3, scale=2))
    assert sheet.shape == (2 * 8 + 2, 3 * 10 + 2 * 2, 3)
    assert (sheet[:8, 12:22] == 40).all() and (sheet[10:, 12:22] == 160).all()
    assert (sheet[10:, 24:] == 255).all()  # the sixth place is empty
    assert contact_sheet(images).size == (3 * 5 + 4, 2 * 4 + 2)
    assert contact_sheet(images[:, :1], columns=9).size == (5 * 5 + 8, 4)


def test_contact_sheet_errors() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet(images.float())
    for bad in ({"columns": 0}, {"scale": 0}):
        with pytest.raises(ValueError, match="cannot lay out"):
            contact_sheet(images, **bad)
    with pytest.raises(ValueError, match="0 images"):
        contact_sheet(images[:0])
