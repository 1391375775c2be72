"""Sheets have the right layout, and pictures fit their budget without a word left out."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from qncd_cli.report.images import CELL, Pair, contact_sheet, encode_all, pair_sheet, to_picture


def _noise(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


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
    with pytest.raises(ValueError, match="uint8"):
        to_picture(images[0].float())


def test_a_sheet_of_pairs_holds_triples_below_their_seeds() -> None:
    images = _noise(2, 32)
    pair = Pair("seed 7, class 1", images[0], images[1])
    sheet = np.array(pair_sheet([pair, pair], columns=1))
    scale = CELL // 32
    for image in pair.images:
        enlarged = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
        assert _places(sheet, enlarged) == 2
    assert (sheet[:14] < 128).any(), "the heading is written"
    with pytest.raises(ValueError, match="no pairs"):
        pair_sheet([])


def _places(sheet: np.ndarray, part: np.ndarray) -> int:
    height, width, _ = part.shape
    rows = np.argwhere((sheet == part[0, 0]).all(2))
    return sum(
        (sheet[y : y + height, x : x + width] == part).all()
        for y, x in rows
        if y + height <= len(sheet) and x + width <= sheet.shape[1]
    )


def test_pictures_stay_lossless_while_they_fit() -> None:
    images = _noise(3, 16)
    found = encode_all(list(images), budget=10_000)
    assert not found.note and len(found.uris) == 3
    decoded = Image.open(io.BytesIO(base64.b64decode(found.uris[1].partition(",")[2])))
    assert (np.array(decoded) == images[1].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("budget", [60_000, 20_000])
def test_pictures_that_do_not_fit_are_compressed_made_smaller_and_noted(budget: int) -> None:
    found = encode_all(list(_noise(4, 300)), budget)
    data = [base64.b64decode(uri.partition(",")[2]) for uri in found.uris]
    assert sum(map(len, data)) <= budget
    sides = {max(Image.open(io.BytesIO(d)).size) for d in data}
    assert len(sides) == 1 and f"at most {sides.pop()} pixels" in found.note


def test_no_pictures_are_no_trouble() -> None:
    assert encode_all([]).uris == []


def test_a_difference_is_eightfold_and_ends_at_white() -> None:
    one = torch.tensor([[[10, 200]]], dtype=torch.uint8)
    other = torch.tensor([[[13, 100]]], dtype=torch.uint8)
    assert Pair("s", one, other).difference.tolist() == [[[24, 255]]]
    assert Pair("s", other, one).difference.tolist() == [[[24, 255]]]
