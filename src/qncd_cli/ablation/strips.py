"""Strips of samples for the page of an ablation: the first seeds of every row, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..lineage import sample_sets
from ..metrics.images_on_disk import read_images
from ..models.loading import DiffusionModel
from ..runtime.sampled_model import SampledModel
from ..stages import sample

if TYPE_CHECKING:
    from .table import AblateRequest
    from .variants import Variant

STRIP = 8
"""Samples of a strip; more are too small to be seen on a phone."""
FULL = "full precision"


@dataclass(frozen=True)
class Strip:
    """Samples of one row, uint8 [N, 3, H, W]; sheet: its contact sheet, None where none is."""

    name: str
    images: Tensor
    sheet: Path | None = None


def strips(
    request: AblateRequest, variants: Sequence[Variant], model: DiffusionModel
) -> list[Strip]:
    """Full precision's strip and one for each row, of those whose images are still there.

    Raises ArtifactError for damaged images.
    """
    config = variants[0].config
    seeds = request.seeds(config)[:STRIP]
    digest = sample.identify(config, model, SampledModel.full_precision(model))["digest"]
    full = request.folder.parent / "full-precision" / digest
    places = [(FULL, full), *((row.label, request.samples(row)) for row in variants)]
    found = []
    for name, folder in places:
        if sample_sets.without_image(folder, seeds):
            continue
        images = read_images([sample_sets.image_path(folder, seed) for seed in seeds])
        sheet = sample_sets.sheet_path(folder)
        linked = name != FULL and sheet.is_file()
        found.append(Strip(name, images, sheet if linked else None))
    return found
