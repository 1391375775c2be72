"""The page of an ablation: its table, scatter and strips; in a browser, where one is here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from browsers import check_page, chromium

from qncd_cli.ablation.rendering import COLUMNS, html
from qncd_cli.ablation.strips import Strip


def row(preset: str, weights: int, activations: int, psnr: float | None, size: int) -> dict:
    entry = {"value": 1.234, "low": 1.012, "high": 1.457}
    return {
        "preset": preset,
        "weights": weights,
        "activations": activations,
        "mean_weight_bits": 5.87,
        "mean_input_bits": 9.13,
        "feature_distance_to_reference": entry,
        "feature_distance_to_full": entry,
        "class_agreement": 0.98,
        "sqnr_latents_db": 20.0,
        "sqnr_median_db": 22.0,
        "sqnr_q05_db": 18.0,
        "sqnr_gain_db": None if preset == "minmax" else {"value": 1.0, "low": 0.5, "high": 1.5},
        "psnr_db": None,
        "psnr_median_db": psnr,
        "psnr_q05_db": 25.0,
        "changed": 3,
        "ssim": 0.95,
        "ssim_median": 0.97,
        "ssim_q05": 0.91,
        "identical_images": psnr == 200.0,
        "identical_latents": False,
        "sqnr_steps_db": [30.0, 25.0, 20.0],
        "bytes": size,
        "bit_operations": 10**12,
        "extra_calls": 0,
        "seconds": 65.4,
    }


def table(rows: list[dict]) -> dict:
    entry = {"value": 1.1, "low": 0.9, "high": 1.3}
    full = {"feature_distance_to_reference": entry, "class_agreement": 1.0, "bytes": 43_440_000}
    protocol = {"num_samples": 300, "first_seed": 5, "seeds": "5-304", "network": None}
    return {"model": "zoo:fashion-ldm", "full": full, "rows": rows, "protocol": protocol}


ROWS = [
    row("minmax", 4, 8, 30.0, 7_000_000),
    row("best+brecq", 4, 8, 42.0, 7_100_000),
    row("qdiffusion", 4, 8, 42.1, 7_100_000),
    row("minmax", 4, 6, 24.0, 7_000_000),
    row("best", 4, 6, 35.5, 7_100_000),
    row("same", 8, 8, 200.0, 11_000_000),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    sheet = folder / "samples" / "minmax_w4a8_sheet.png"
    strips = [Strip("full precision", images), Strip("minmax_w4a8", images.flip(3), sheet)]
    path = folder / "ablation.html"
    path.write_text(html(table(ROWS), "Variants of fashion_ldm", strips, folder))
    return path


def test_the_page_of_an_ablation_can_be_read_everywhere(page, tmp_path) -> None:
    with chromium(tmp_path) as driver:
        check_page(driver, page)


def test_the_page_begins_with_the_closest_row_and_has_every_number(page) -> None:
    text = page.read_text()
    verdict = text.split('<p class="verdict">')[1].split("</p>")[0]
    said = "Closest to full precision: same W8A8, identical images, 3.9 times smaller."
    assert verdict == said
    assert "best+brecq W4A8, median PSNR 42.00 dB" in html(table(ROWS[:2]), "t", [], page.parent)
    first, everything = (part.split("</table>")[0] for part in text.split("<table>")[1:3])
    assert first.count("<th ") < everything.count("<th ") == len(COLUMNS)
    assert first.count("<tr>") == everything.count("<tr>") == 2 + len(ROWS)


def test_columns_without_any_number_are_left_out_of_the_first_table(tmp_path) -> None:
    bare = {**ROWS[0], "feature_distance_to_full": None, "feature_distance_to_reference": None}
    found = table([bare])
    found["full"]["feature_distance_to_reference"] = None
    text = html(found, "t", [], tmp_path)
    first = text.split("<table>")[1].split("</table>")[0]
    assert "distance" not in first and "distance to full" in text


def test_the_scatter_has_every_row_that_differs_and_strips_the_same_seeds(page) -> None:
    text = page.read_text()
    scatter = text.split("<h3>PSNR over size</h3>")[1].split("</figure>")[0]
    assert len(re.findall(r"<circle ", scatter)) == 5 and "best+brecq W4A8" in scatter
    assert "Seeds 5 to 12" in text
    strips = text.split('<div class="rows">')[1]
    assert strips.count("<img ") == 16
    assert 'href="samples/minmax_w4a8_sheet.png"' in strips


def test_an_ablation_without_samples_or_rows_is_still_a_page(tmp_path) -> None:
    text = html({**table([]), "full": None}, "t", [], tmp_path)
    assert "<h1>t</h1>" in text and "verdict" not in text.split("</style>")[1]
