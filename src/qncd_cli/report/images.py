"""Images as parts of pages and sheets: pairs with their difference, within a budget of bytes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..metrics.tensor import psnr_db
from ..vocabulary import said

SHEET_GAP = 2  # pixels between the images of a contact sheet
AMPLIFIED = 8
"""Factor of a difference image: one of 255 levels is then to be seen, one of 32 is full."""
PAGE_BYTES = 3_300_000
"""Bytes of all pictures of a page, before base64 makes a third more of them: 4.4 MB."""
SIDES = (512, 384, 256, 192, 128, 96)
"""Pixels of the longer side that pictures are made smaller to, one after the other, until they fit;
smaller ones show no difference any more."""
QUALITY = 85
"""WebP's, where lossless pictures do not fit; below 80 its own faults are seen."""
MARGIN, LINE = 6, 14
"""Pixels around the parts of a sheet of triples, and of a line of text in it."""
CELL = 96
"""Pixels at least of an image in a sheet of triples; smaller ones are enlarged, pixel by pixel."""


@dataclass(frozen=True)
class Pair:
    """Two images of one seed, uint8 [1 or 3, H, W]; title: the seed, and what it was to show."""

    title: str
    full: Tensor
    quantized: Tensor

    @property
    def psnr(self) -> float:
        """Decibels, infinite for equal images."""
        return psnr_db(self.full[None], self.quantized[None])

    @property
    def difference(self) -> Tensor:
        """Absolute difference times AMPLIFIED, uint8."""
        gap = (self.full.int() - self.quantized.int()).abs() * AMPLIFIED
        return gap.clamp(max=255).to(torch.uint8)

    @property
    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Full precision, quantized, and how they differ."""
        return self.full, self.quantized, self.difference


@dataclass(frozen=True)
class Encoded:
    """Pictures as data: URIs, in their order; note: what was done to them to fit, or empty."""

    uris: Sequence[str]
    note: str


def encode_all(images: Sequence[Tensor], budget: int = PAGE_BYTES) -> Encoded:
    """Pictures that take at most `budget` bytes together, lossless where that is enough.

    images: uint8 [1 or 3, H, W]. Else as WebP, made smaller step by step; the note says so.
    Raises ValueError if one is of another type or shape.
    """
    pictures = [to_picture(image) for image in images]
    found = _lossless(pictures, budget)
    if found is not None:
        return Encoded(found, "")
    longest = max((max(p.size) for p in pictures), default=0)
    for side in [longest, *(s for s in SIDES if s < longest)]:
        made = [_webp(picture, side) for picture in pictures]
        if sum(map(len, made)) <= budget:
            break
    small = f", at most {side} pixels wide and high" if side < longest else ""
    note = (
        f"So that this page stays small the pictures are compressed (WebP, quality {QUALITY})"
        f"{small}; numbers and differences are of the images as they were drawn."
    )
    return Encoded([_uri("webp", data) for data in made], note)


def _lossless(pictures: Sequence[Image.Image], budget: int) -> list[str] | None:
    """None as soon as they are too large."""
    uris, size = [], 0
    for picture in pictures:
        data = _bytes(picture, "PNG", optimize=True)
        size += len(data)
        if size > budget:
            return None
        uris.append(_uri("png", data))
    return uris


def _webp(picture: Image.Image, side: int) -> bytes:
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _bytes(picture, "WEBP", quality=QUALITY)


def _bytes(picture: Image.Image, kind: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file, without metadata."""
    return _bytes(picture, "PNG", optimize=True)


def to_picture(image: Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W] -> RGB picture. Raises ValueError for another type or shape."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
        found = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"expected an image uint8 [1 or 3, H, W], got {found}")
    return Image.fromarray(image.cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def contact_sheet(images: Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """uint8 [N, 1 or 3, H, W] -> one RGB picture, row by row, on white.

    columns: as many as rows unless given; scale: every pixel becomes scale x scale.
    Raises ValueError if the images are of another dtype or shape, none, or columns or scale < 1.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"expected images uint8 [N, 1 or 3, H, W], got {found}")
    count = len(images)
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if count == 0 or columns < 1 or scale < 1:
        raise ValueError(f"cannot lay out {count} images in {columns} columns at scale {scale}")
    columns = min(columns, count)
    height, width = (side * scale for side in images.shape[-2:])
    step_x, step_y = width + SHEET_GAP, height + SHEET_GAP
    size = (columns * step_x - SHEET_GAP, math.ceil(count / columns) * step_y - SHEET_GAP)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        picture = to_picture(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(picture, (index % columns * step_x, index // columns * step_y))
    return sheet


def pair_sheet(pairs: Sequence[Pair], columns: int | None = None) -> Image.Image:
    """Triples of full precision, quantized and eightfold difference, each below its seed and PSNR.

    columns: triples side by side; None for as many as make the sheet about square.
    Raises ValueError where there are none.
    """
    if not pairs:
        raise ValueError("cannot lay out a sheet of no pairs")
    height, width = pairs[0].full.shape[-2:]
    scale = max(1, CELL // max(height, width))
    cell = (width * scale, height * scale)
    wide = 3 * cell[0] + 2 * SHEET_GAP + MARGIN
    high = LINE + cell[1] + MARGIN
    if columns is None:
        columns = max(1, round(math.sqrt(len(pairs) * high / wide)))
    columns = min(columns, len(pairs))
    font = ImageFont.load_default(LINE - 3)
    rows = math.ceil(len(pairs) / columns)
    size = (columns * wide + MARGIN, LINE + rows * high + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    heading = f"full precision | quantized | difference x {AMPLIFIED}"
    draw.text((MARGIN, 2), heading, "black", font)
    for index, pair in enumerate(pairs):
        left = MARGIN + index % columns * wide
        top = LINE + MARGIN + index // columns * high
        draw.text((left, top), f"{pair.title}: {said('psnr_db', pair.psnr)}", "black", font)
        for place, image in enumerate(pair.images):
            picture = to_picture(image).resize(cell, Image.Resampling.NEAREST)
            sheet.paste(picture, (left + place * (cell[0] + SHEET_GAP), top + LINE))
    return sheet
