"""Text encoders in integers: made from the run's prompts, and how far embeddings are from full
precision's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backends.base import get_backend
from ..config.schema import Config
from ..metrics.tensor import sqnr_db
from ..models.loading import DiffusionModel
from ..models.text import Encoded
from ..progress import Track, no_progress
from ..ptq.text_encoders import PROMPTS, quantize_encoders, see_inputs
from ..runtime.text_encoders import install_encoders
from ..store.artifacts import Artifact, seal
from ..store.partial import NOTHING_KEPT, Partial
from ..vocabulary import IDENTICAL_DB

EMBEDDINGS = {
    "encoder_hidden_states": "hidden states",
    "text_embeds": "pooled",
    "pooled_projections": "pooled",
}
"""Arguments of a denoiser that text encoders make, and what people call them."""
MASK = "encoder_attention_mask"
"""The argument that says which hidden states are read."""


def run(
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    partial: Partial = NOTHING_KEPT,
) -> Artifact:
    """The text encoders at `text_encoders.bits`, with the error of what they make of the prompts.

    model: with its text encoders, whose layers are replaced.
    """
    assert model.text is not None and config.text_encoders.bits is not None
    text, bits, full = model.text.some(PROMPTS), config.text_encoders.bits, list[Encoded]()
    module = text.module
    seen = see_inputs(module, lambda: full.append(text.encode(track)))
    made = quantize_encoders(module, bits, seen, lambda: text.encode(track), track, partial)
    install_encoders(module, made, model.source, get_backend("simulate", model.device))
    about = {
        "source": model.source,
        "prompts": len(text.prompts.texts),
        "fidelity": fidelity(full[0], text.encode(track)),
    }
    return seal(
        replace(
            made,
            body={**made.body, **about},
            config=config.stage_digest("text_encoders"),
            model=model.digest,
        )
    )


def fidelity(full: Encoded, other: Encoded) -> dict[str, dict[str, float]]:
    """SQNR in dB of each embedding over all prompts, the negative one among them, and of the prompt
    that has the lowest. What the denoiser does not read is left out; IDENTICAL_DB at most."""
    found = {}
    for name, says in EMBEDDINGS.items():
        if name not in full.table:
            continue
        sides = _rows(full, name), _rows(other, name)
        pairs = [(a, b) for a, b in zip(*sides, strict=True) if a.any()]
        if not pairs:
            continue
        whole = sqnr_db(*(torch.cat([row.flatten() for row in side]) for side in sides))
        found[says] = {
            "sqnr_embeddings_db": min(whole, IDENTICAL_DB),
            "sqnr_lowest_db": min(IDENTICAL_DB, *(sqnr_db(a, b) for a, b in pairs)),
        }
    return found


def _rows(encoded: Encoded, name: str) -> list[Tensor]:
    """The embedding of each prompt, as far as it is read."""
    found: list[Tensor] = []
    for table in (encoded.table, encoded.negative or {}):
        for number, row in enumerate(table.get(name, ())):
            mask = table.get(MASK) if row.ndim == 2 else None
            found.append(row if mask is None else row[mask[number].bool()])
    return found
