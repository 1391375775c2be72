"""The report is self-contained, escaped and readable, and honest where a number is missing."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from qncd_cli.report.headline import BASELINE
from qncd_cli.report.images import Pair
from qncd_cli.report.insight import Layer, Network, NoiseCurves, Ranges
from qncd_cli.report.page import Group, Report, html_report

DISTANCE = {"network": "fashion-classifier", "name": "fd_fashion", "value": 1.25}
METRICS = {
    "protocol": {"num_samples": 500, "steps": 20, "backend": "int8", "compiled": True},
    "full": {"feature_distance": {**DISTANCE, "low": 1.1, "high": 1.4}, "fid": None},
    "quantized": {"feature_distance": {**DISTANCE, "value": 1.5, "low": None, "high": None}},
    "fidelity": {
        "psnr_db": math.inf,
        "sqnr_latents_db": 17.26,
        "sqnr_steps_db": [1.0],
        "per_seed": {"psnr_db": {"0": 12.0, "1": 30.0, "2": 31.0, "3": 200.0}},
    },
    "bytes": {"full": 44_000_000, "quantized": 7_000_000},
    "quantization": {"preset": "best", "weights": 4, "activations": 8},
}
VOID = ("meta", "img", "link", "input", "br", "wbr")


class _Balance(HTMLParser):
    """Collects tags that are left open or closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def _image(seed: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, 8, 6), dtype=torch.uint8, generator=generator)


def _group(*titles: str, channels: int = 3, folded: bool = False) -> Group:
    pairs = [
        Pair(title, _image(2 * i, channels), _image(2 * i + 1, channels))
        for i, title in enumerate(titles)
    ]
    return Group("Pairs", pairs, folded)


def _everything() -> Report:
    """A report with all of its parts."""
    noise = NoiseCurves([3, 2, 1], {"raw": [0.1, 0.2, 0.3]}, {"raw": [1.0, 2.0, 3.0]})
    layers = [
        Layer("down.0.conv", "conv", "W4A8", 0.1, 5, 0.5, ""),
        Layer("out", "x", "float", None, 0, 0.5, "configured"),
    ]
    return Report(
        METRICS,
        "Report",
        "fashion-ldm",
        "2026-11-27",
        [_group("seed 0", "seed 1"), _group("seed 2", folded=True)],
        {"W4A8": [20.0, 18.5, 17.0], "W4A6": [19.0, math.inf, None]},
        {"0": [12.0, 30.0], "1": [31.0, 200.0]},
        "class",
        noise,
        Network("error of the prediction", {"down.0": layers[:1], "out": layers[1:]}),
        [Ranges("down.0.conv", {"before": [9.0, 1.0], "after": [2.0, 1.0]}, (9.0, 2.0))],
        {"plain": METRICS},
        {
            "model": "m",
            "rows": [
                {"name": BASELINE, "seconds_per_call": 0.3, "speedup": 1.0},
                {"name": "int8-w4a8-compiled", "seconds_per_call": 0.1, "speedup": 3.0},
            ],
        },
        {"a": 1},
        ["qncd quantize"],
        None,
        {
            "none, correction none": {"mean": [0.1, 0.2, 0.3], "spread": [0.3, 0.4, 0.5]},
            "quantized, correction runtime": {"mean": [0.1, 0.1, 0.1], "spread": [0.3, 0.3, 0.3]},
        },
    )


def _text(html: str) -> str:
    return re.sub(r"<[^>]*>", " ", html.split("</head>")[1]).replace("\u00a0", " ")


def test_report_is_well_formed_and_needs_no_other_file() -> None:
    html = html_report(_everything())
    page = _Balance()
    page.feed(html)
    assert not page.open and page.tags.count("img") == 3 + 3 * 3
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|@import|url\(|https?://""", html)
    assert html.count('role="img"') == 7 and len(re.findall(r"<svg[^>]*>", html)) > 5


def test_every_picture_and_chart_has_a_text_in_its_place() -> None:
    html = html_report(_everything())
    pictures = re.findall(r"<img [^>]*>", html.split('id="viewer"')[1].split("</section>")[1])
    assert len(pictures) == 9 and all(re.search(r'alt="seed \d, \w', img) for img in pictures)
    labels = re.findall(r'role="img" aria-label="([^"]+)"', html)
    assert "SQNR by step, dB ↑ over sampling step, from 17.00 to 20.00" in labels
    assert html.count("<summary>The numbers</summary>") == len(labels)


def test_report_shows_the_numbers() -> None:
    facts = {"model": "zoo:fashion-ldm"}
    text = _text(html_report(Report(METRICS, "Report", facts=facts)))
    for expected in ("fd_fashion", "1.250", "[1.100, 1.400]", "17.26", "identical", "–"):
        assert expected in text
    for expected in ("44.00", "7.000", "15.9 %", "zoo:fashion-ldm", "steps"):
        assert expected in text
    assert "FID" not in text  # nothing measured it


def test_the_first_sentence_is_the_verdict() -> None:
    html = html_report(_everything())
    verdict = html.split('<p class="verdict">')[1].split("</p>")[0]
    assert verdict == "fashion-ldm at W4A8 (preset best): 6.3 times smaller; 2026-11-27."
    assert html.index("verdict") < html.index("<table")


def test_report_shows_a_real_fid_once_and_under_its_name() -> None:
    entry = {"network": "inception-v3-compat", "name": "fid", "value": 9.48}
    found = {"feature_distance": entry, "fid": 9.48, "kernel_distance": entry, "kid": 9.48}
    metrics = {"full": found, "fidelity": {"feature_distance": entry}}
    text = _text(html_report(Report(metrics, "t")))
    assert text.count("FID ↓") == text.count("KID ↓") == 1 and text.count("9.480") == 3
    assert "distance to data" not in text


def test_report_says_first_what_was_measured_and_folds_protocol_and_commands() -> None:
    facts = {"bits": "W4A8 (5.9 / 9.1)", "preset": "best", "CPU": "a CPU", "command": "qncd eval"}
    commands = ["qncd calibrate --config 'my run/config.yaml'", "qncd quantize"]
    html = html_report(Report(METRICS, "fashion-ldm, W4A8", facts=facts, commands=commands))
    before, _, after = html.split("<h2>What was measured</h2>")[1].partition("<details>")
    assert "<title>fashion-ldm, W4A8</title>" in html
    for key, value in facts.items():
        assert f"<dt>{key}</dt><dd>{value}</dd>" in before
    assert "num_samples" in after and "num_samples" not in before
    assert "qncd calibrate --config &#39;my run/config.yaml&#39;\nqncd quantize" in after


def test_a_set_measured_alike_is_a_column_and_the_speed_is_a_row() -> None:
    html = html_report(_everything())
    head = html.split('<table class="head">')[1].split("</table>")[0]
    assert re.findall(r'<th scope="col">([^<]*)', head) == ["full precision", "quantized", "plain"]
    speed = head.split("speedup")[1].split("</tr>")[0]
    assert re.findall(r"<td>([^<]*)</td>", speed) == ["1.000", "3.000", "3.000"]


def test_what_every_correction_leaves_along_the_trajectory_is_a_curve() -> None:
    html = html_report(_everything())
    for key in ("Mean", "Spread"):
        chart = html.split(f"{key} of the deviation along the trajectory")[1].split("</svg>")[0]
        assert "none, correction none" in chart and "quantized, correction runtime" in chart
    empty = replace(_everything(), deviations={"none": {"mean": [], "spread": []}})
    assert "of the deviation" not in html_report(empty)


def test_without_a_bench_there_is_no_speed() -> None:
    assert "speedup" not in html_report(Report(METRICS, "t"))
    other = {"rows": [{"name": BASELINE, "seconds_per_call": 1.0, "speedup": 1.0}]}
    assert "speedup" not in html_report(Report(METRICS, "t", bench=other))


def test_report_of_one_set_has_no_fidelity_column() -> None:
    metrics = {"images": {"fid": 12.5, "precision": 0.7, "kid": None}, "protocol": {}}
    html = html_report(Report(metrics, "One set"))
    assert "FID" in html and "12.50" in html and html.count('<th scope="col">') == 1
    assert html_report(Report({}, "Nothing")).count("<table") == 0


def test_parts_that_nothing_was_measured_for_are_left_out() -> None:
    html = html_report(Report({}, "Nothing"))
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["What was measured"]


def test_report_escapes_what_comes_from_outside() -> None:
    bad = '<script>alert("x")</script>&'
    metrics = {
        "images": {"feature_distance": {"network": bad, "value": 1.0}},
        "protocol": {bad: bad},
        "checks": [{"says": bad}],
    }
    html = html_report(
        Report(
            metrics,
            bad,
            bad,
            bad,
            [_group(bad)],
            {bad: [1.0, 2.0]},
            {bad: [1.0], "b": [2.0]},
            bad,
            facts={bad: [bad]},
            commands=[bad],
        )
    )
    assert "<script>alert" not in html and 'alert("x")' not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize("channels", [1, 3])
def test_report_images_survive_the_round_trip_with_their_difference(channels: int) -> None:
    group = _group("s", channels=channels)
    (pair,) = group.pairs
    html = html_report(Report({}, "t", groups=[group]))
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    gap = (8 * (pair.full.int() - pair.quantized.int()).abs()).clamp(max=255).to(torch.uint8)
    for uri, image in zip(uris, (pair.full, pair.quantized, gap), strict=True):
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(uri))))
        assert (pixels == image.expand(3, -1, -1).permute(1, 2, 0).numpy()).all()


def test_sixty_four_pairs_of_noise_stay_below_five_megabytes() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (65, 3, 256, 256), dtype=torch.uint8, generator=generator)
    pairs = [Pair(f"seed {i}", noise[i], noise[i + 1]) for i in range(64)]
    html = html_report(Report({}, "t", groups=[Group("all", pairs)]))
    assert 2_000_000 < len(html.encode()) < 5_000_000
    assert html.count("data:image/webp") == 3 * 64
    assert "the pictures are compressed (WebP, quality 85), at most" in _text(html)


def test_classes_have_bars_and_of_many_the_worst_are_shown() -> None:
    many = {str(i): [float(20 + i), 10.0, 90.0] for i in range(50)}
    html = html_report(Report({}, "t", classes=many))
    names = re.findall(r'<th scope="row">(\d+)</th>', html)
    assert names == [str(i) for i in range(40)] and "The worst 40 of 50." in html
    assert "By class" not in html_report(Report({}, "t", classes={"0": [1.0]}))
