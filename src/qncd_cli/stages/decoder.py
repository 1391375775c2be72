"""What a decoder in integers costs by itself: a set's images beside those of the same latents in
floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lineage.sample_set import SampleSet
from ..metrics.checks import Note
from ..metrics.tensor import each_psnr_db, pooled_psnr_db, squared_errors
from ..models.loading import DiffusionModel
from ..progress import Track
from ..vocabulary import IDENTICAL_DB, cell

KIND = "first_stage"
"""Key of a manifest's digests that says that a set was decoded in integers."""
MOST = 1000
"""Images that are decoded again, the first of the set; more: only time."""
BATCH = 50


def decoder_fidelity(samples: SampleSet, model: DiffusionModel, track: Track) -> dict[str, Any]:
    """PSNR of images to the floating-point decoder's: pooled, median and 5 % quantile, in dB.

    samples: decoded in integers. Identical images count as IDENTICAL_DB.
    """
    seeds = samples.seeds[:MOST]
    parts = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
    errors: list[Tensor] = []
    for part in track(parts, "decoding in floating point", len(parts), "batches"):
        with torch.no_grad():
            images = model.decode(samples.latents.of(part))
        drawn = samples.cut(part).images.read()
        errors.append(squared_errors(images.expand_as(drawn), drawn))
    return {**spread_of(torch.cat(errors)), "num_samples": len(seeds)}


def spread_of(errors: Tensor) -> dict[str, float]:
    """Pooled PSNR, median and 5 % quantile in dB. errors: mean squared ones of images, [N]."""
    each = torch.tensor(each_psnr_db(errors), dtype=torch.float64).clamp(max=IDENTICAL_DB)
    return {
        "psnr_db": min(pooled_psnr_db(errors), IDENTICAL_DB),
        "psnr_median_db": float(each.quantile(0.5)),
        "psnr_q05_db": float(each.quantile(0.05)),
    }


def note_of_decoder(found: dict[str, Any]) -> Note:
    """The same in a sentence, among what there is to say of a set."""
    keys = ("psnr_median_db", "psnr_db", "psnr_q05_db")
    median, pooled, low = (cell(key, found[key]) for key in keys)
    says = (
        "decoded in integers: PSNR in dB to the floating-point decoder over the same latents: "
        f"median {median}, pooled {pooled}, 5 % quantile {low}"
    )
    return {"set": "quantized", "what": "decoder", "count": found["num_samples"], "says": says}
