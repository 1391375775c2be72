"""Text encoders in integers: made from the run's prompts, and how far embeddings are from full
precision's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.base import get_backend
from ..config.schema import Config
from ..metrics.tensor import sqnr_db
from ..models.loading import DiffusionModel
from ..models.text import Encoded
from ..models.text_encoders import TextEncoders
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
Embeddings = dict[str, list[Tensor]]
"""Embeddings of each prompt, by what they are."""
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
    text, bits, full = model.text.some(PROMPTS), config.text_encoders.bits, list[Embeddings]()
    module = text.module
    seen = see_inputs(module, lambda: full.append(embeddings(text, track)))
    made = quantize_encoders(module, bits, seen, lambda: text.encode(track), track, partial)
    install_encoders(module, made, model.source, get_backend("simulate", model.device))
    about = {
        "source": model.source,
        "prompts": len(text.prompts.texts),
        "fidelity": fidelity(full[0], embeddings(text, track)),
    }
    return seal(
        replace(
            made,
            body={**made.body, **about},
            config=config.stage_digest("text_encoders"),
            model=model.digest,
        )
    )


def embeddings(text: TextEncoders, track: Track = no_progress) -> Embeddings:
    """What a denoiser reads of each prompt and the negative one; of several encoders also the
    hidden states of each by itself, which joined ones may hide."""
    states: dict[str, list[Tensor]] = {}
    handles = []
    encoders = [*text.module.named_children()]
    for name, encoder in encoders if len(encoders) > 1 else ():

        def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            layers = output.hidden_states  # asked for where the last but one is read
            found = output.last_hidden_state if layers is None else layers[-2]
            states.setdefault(name, []).extend(found)

        handles.append(encoder.register_forward_hook(hook))
    try:
        encoded = text.encode(track)
    finally:
        for handle in handles:
            handle.remove()
    return {**read_of(encoded), **states}


def read_of(encoded: Encoded) -> Embeddings:
    """The embeddings of each prompt and the negative one, as far as a denoiser reads them."""
    found: Embeddings = {}
    for name, says in EMBEDDINGS.items():
        for table in (encoded.table, encoded.negative or {}):
            for number, row in enumerate(table.get(name, ())):
                mask = table.get(MASK) if row.ndim == 2 else None
                read = row if mask is None else row[mask[number].bool()]
                found.setdefault(says, []).append(read)
    return found


def fidelity(full: Embeddings, other: Embeddings) -> dict[str, dict[str, float]]:
    """SQNR in dB of each embedding over all prompts, and of the prompt that has the lowest;
    IDENTICAL_DB at most. Embeddings that are zeros count for nothing."""
    found = {}
    for says, rows in full.items():
        pairs = [(a, b) for a, b in zip(rows, other[says], strict=True) if a.any()]
        if not pairs:
            continue
        sides = zip(*pairs, strict=True)
        whole = sqnr_db(*(torch.cat([row.flatten() for row in side]) for side in sides))
        found[says] = {
            "sqnr_embeddings_db": min(whole, IDENTICAL_DB),
            "sqnr_lowest_db": min(IDENTICAL_DB, *(sqnr_db(a, b) for a, b in pairs)),
        }
    return found
