"""The arithmetic of the bench of images."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.bench import image_rendering
from qncd_cli.bench.images import PARTS, DrawnImages, ImageRow, fidelity, timing


def drawn(value: int, latent: float) -> DrawnImages:
    images = torch.full((2, 1, 4, 4), value, dtype=torch.uint8)
    return DrawnImages(images, torch.full((2, 1, 2, 2), latent), {})


def test_a_batch_is_divided_among_its_images():
    rounds = [dict(zip(PARTS, (0.0, k, 0.0, 1.0, 1.0), strict=True)) for k in (2.0, 4.0, 6.0)]
    found = timing(rounds, 2)
    assert found["seconds_per_image"] == 3.0 and found["seconds"] == [2.0, 3.0, 4.0]
    assert found["parts"]["steps"] == 2.0 and found["parts"]["png"] == 0.5


def test_fidelity_is_to_the_reference_and_none_of_it_to_itself():
    found = fidelity(drawn(100, 1.0), drawn(101, 1.1), same=False)
    assert found["psnr_db"] == pytest.approx(48.13, abs=0.01)
    assert found["sqnr_latents_db"] == pytest.approx(20, abs=0.01)
    assert {*fidelity(drawn(100, 1.0), drawn(100, 1.0), same=True).values()} == {None}


def test_names_say_what_a_row_is():
    row = ImageRow("int8-reuse-decoder-compiled")
    assert row.integers and row.compiled and row.dtype is torch.float32
    assert "no plan" in row.why_unavailable(["quantized", "first_stage"])
    assert "no decoder" in row.why_unavailable(["quantized", "reuse"])
    assert ImageRow("bfloat16-eager").dtype is torch.bfloat16
    mixed = ImageRow("int8-bfloat16-reuse-compiled")
    assert mixed.integers and mixed.compiled and mixed.dtype is torch.bfloat16


def test_identical_images_are_called_so_and_the_reference_has_no_distance():
    row = {
        **{"batch_size": 1, "seconds_per_image": 0.5, "spread": 0.0, "speedup": 1.0},
        **{"parts": dict.fromkeys(PARTS, 0.1), "peak_bytes": None},
        **dict.fromkeys(("psnr_db", "psnr_median_db", "sqnr_latents_db")),
    }
    report = {"rows": [{**row, "name": "float32-eager"}, {**row, "name": "int8"}]}
    first, second = image_rendering.cells(report, 1)
    key = next(name for name in image_rendering.COLUMNS if name.startswith("PSNR, dB"))
    assert (first[key], second[key]) == ("–", "identical")
    assert first["ms an image ↓"] == "500.0"
