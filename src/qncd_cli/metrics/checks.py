"""What is wrong with images, or too little of them, before any number is taken from them.

A note is {set, what, count, says}: which set it is about, the kind of fault, how many images have
it (None where it is about the whole set), and a sentence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..vocabulary import number
from .networks import FeatureNetwork
from .record import UNREFERENCED
from .reference import Reference
from .seen import Seen

Note = dict[str, Any]
IMAGES_PER_FEATURE = 5
"""Fewer, and a Frechet distance is mostly bias: FID is published on 10,000 images or more, in 2,048
features. Larger: more sets are noted."""
IMBALANCE = 0.1
"""Difference between the most and the least frequent class that is noted, as a share of the mean;
one image more is always free, since classes are taken in turn."""


def not_finite(values: Tensor) -> dict[int, int]:
    """Samples that hold NaN or infinity: row -> how many. values: [N, ...] float."""
    counts = (~values.isfinite()).flatten(1).sum(1).tolist()
    return {row: count for row, count in enumerate(counts) if count}


# ------------------------------------------------------------------ notes


def notes_of_skipped(name: str, files: Sequence[str]) -> list[Note]:
    """What was left out of a set because it cannot be read."""
    if not files:
        return []
    says = f"{name}: {len(files)} files left out that cannot be read (first: {files[0]})"
    return [{"set": name, "what": "skipped", "count": len(files), "says": says}]


def notes_of_images(which: str, seen: Seen, names: Sequence[str]) -> list[Note]:
    """Black, constant and repeated images, and pixels that end at 1.

    seen: of N images; names: of the images, N.
    """
    notes: list[Note] = []

    def note(what: str, rows: Collection[int], says: str, more: str = "") -> None:
        if rows:
            first = names[min(rows)]
            text = f"{which}: {len(rows)} of {len(names)} images {says} (first: {first}{more})"
            notes.append({"set": which, "what": what, "count": len(rows), "says": text})

    flat = seen.flat()
    note("black", [row for row in flat if not any(flat[row])], "are black")
    note("constant", [row for row in flat if any(flat[row])], "are of one colour")
    twice = seen.duplicates()
    like = f", like {names[twice[min(twice)]]}" if twice else ""
    note("duplicates", twice, "repeat an earlier one", like)
    if seen.brightest == 1:
        says = f"{which}: no pixel is above 1 of 255; images stored as 0 to 1 are black to a metric"
        notes.append({"set": which, "what": "pixel_range", "count": None, "says": says})
    return notes


def notes_of_classes(counts: Mapping[str, int]) -> list[Note]:
    """Classes that were asked for more often than others. counts: class -> images."""
    if not counts:
        return []
    least, most = min(counts, key=lambda c: counts[c]), max(counts, key=lambda c: counts[c])
    mean = sum(counts.values()) / len(counts)
    if counts[most] - counts[least] <= max(1, IMBALANCE * mean):
        return []
    says = (
        f"classes are not balanced: {counts[most]} images of class {most}, {counts[least]} of "
        f"class {least}; a distance to data depends on the shares of the classes"
    )
    return [{"set": "samples", "what": "classes", "count": None, "says": says}]


def notes_of_reference(
    count: int,
    size: Sequence[int],
    reference: Reference | None,
    network: FeatureNetwork | None,
    metrics: Collection[str],
) -> list[Note]:
    """Too few images for the network's features, sizes that differ, faults of the reference.

    count, size: how many images there are, and their height and width; reference: prepared for the
    metrics.
    """
    if reference is None or network is None or not set(metrics) - UNREFERENCED:
        return []
    notes: list[Note] = []
    enough = IMAGES_PER_FEATURE * network.feature_size
    if "fid" in metrics and reference.statistics is not None and 2 <= count < enough:
        bias = frechet_bias(torch.from_numpy(reference.statistics["sigma"]), count)
        says = (
            f"{count} images are few for the {network.feature_size} features of {network.name}: "
            f"even images like the reference would be about {number(bias)} away from it"
        )
        notes.append({"set": "samples", "what": "too_few", "count": count, "says": says})
    held = reference.num_samples
    if held is not None and held < enough:
        says = (
            f"the reference's {held} images are few for the {network.feature_size} features of "
            f"{network.name}: distances to more images like these would be smaller"
        )
        notes.append({"set": "reference", "what": "too_few", "count": held, "says": says})
    if reference.images is not None:
        names = [f"number {row + 1}" for row in range(len(reference.images))]
        seen = reference.seen or Seen.of(reference.images)
        notes += notes_of_images("reference", seen, names)
        other = reference.images.shape[-2:]
        if list(other) != list(size):
            mine, its = (f"{width}x{height}" for height, width in (size, other))
            says = f"images of {mine} pixels, reference of {its}: the network resizes them unalike"
            notes.append({"set": "samples", "what": "sizes", "count": None, "says": says})
    return notes


def frechet_bias(sigma: Tensor, count: int, seed: int = 0) -> float:
    """Frechet distance of count Gaussian features to the distribution they are drawn from.

    sigma: [D, D] float64, its covariance; count: >= 2. The distance that a perfect model would
    have: zero for infinitely many features only. One draw, which D directions average out.
    """
    values = torch.linalg.eigvalsh(sigma).clamp(min=0)  # the distance does not change by rotation
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, len(values), generator=generator, dtype=torch.float64)
    drawn *= values.sqrt()
    mean = drawn.mean(0)
    centred = (drawn - mean) / (count - 1) ** 0.5  # sample covariance S = centred^T centred
    half = centred * values.sqrt()
    gram = half @ half.T if count < len(values) else half.T @ half  # eigenvalues of sigma S
    root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float(mean.square().sum() + values.sum() + centred.square().sum() - 2 * root)
