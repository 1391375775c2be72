"""Forecast of the decoder in integers: its artifact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config.schema import Config
from ..models.topology import attention_sites
from ..ptq.first_stage import OBSERVER, plan_decoder
from ..store.artifacts import Artifact
from ..store.layer_entry import AttentionEntry, bodies
from .artifacts import blank
from .shapes import Shapes

SOME_COUNT = 10**10
"""Multiplications of an image; only how many digits they have counts."""


def artifact(config: Config, shapes: Shapes) -> Artifact | None:
    """None where none is made: without `first_stage.bits`, or for a model of pixels."""
    bits, model = config.first_stage.bits, shapes.first_stage
    if bits is None or model is None:
        return None
    decoder: Any = model.decoder
    plans = plan_decoder(decoder, bits)
    entries = {p.name: p.entry(smoothed=False, shifted=False) for p in plans}
    entry = AttentionEntry(bits, bits, OBSERVER)
    body = {
        "layers": bodies({n: replace(e, rounding="nearest") for n, e in entries.items()}),
        "attention": bodies({site.name: entry for site in attention_sites(decoder)}),
        "groups": 1,
        "group_bounds": [],
        "macs": SOME_COUNT,
        "integer_macs": SOME_COUNT,
        "source": shapes.source,
    }
    return blank("first_stage", body)
