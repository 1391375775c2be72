"""The page that raters open: one file that does not know which side is which.

All trials are one picture without a loss, two images to a trial, so that neither names nor sizes
nor compression tell images apart; the page cuts it up.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..report.images import png_bytes, to_picture
from ..report.rendering import render
from .trials import DAMAGED, Trial

LARGEST = 512
"""Pixels of the longer side of an image; larger ones are made smaller, all alike."""
BLOCKS = 6
"""Squares across a damaged image: what it shows is hard to tell, and nobody prefers it."""


def damaged(image: Tensor) -> Tensor:
    """uint8 [C, H, W] -> the same in a few squares of one colour each."""
    small = F.adaptive_avg_pool2d(image.float(), BLOCKS)
    return F.interpolate(small[None], image.shape[-2:], mode="nearest")[0].round().to(torch.uint8)


def study_page(
    study: str, trials: Sequence[Trial], image: Callable[[str, int], Tensor], question: str
) -> str:
    """HTML of a study. study: its id; image: variant, seed -> uint8 [1 or 3, H, W]."""
    sides = [
        [_picture(variant, trial.seed, image) for variant in (trial.left, trial.right)]
        for trial in trials
    ]
    width, height = sides[0][0].size
    columns = max(1, round(math.sqrt(len(trials) * height / (2 * width))))
    rows = math.ceil(len(trials) / columns)
    sheet = Image.new("RGB", (columns * 2 * width, rows * height))
    for number, pictures in enumerate(sides):
        for side, picture in enumerate(pictures):
            place = ((number % columns * 2 + side) * width, number // columns * height)
            sheet.paste(picture, place)
    values = {
        "study": study,
        "count": len(trials),
        "columns": columns,
        "width": width,
        "height": height,
    }
    uri = "data:image/png;base64," + base64.b64encode(png_bytes(sheet)).decode("ascii")
    return render("study.html", title="Which picture?", question=question, values=values, sheet=uri)


def _picture(variant: str, seed: int, image: Callable[[str, int], Tensor]) -> Image.Image:
    found = damaged(image("full", seed)) if variant == DAMAGED else image(variant, seed)
    picture = to_picture(found)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return picture
