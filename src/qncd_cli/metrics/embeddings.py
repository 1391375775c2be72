"""What is said of text encoders in integers; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..vocabulary import cell

KIND = "text_encoders"
"""The artifact, and the key of a manifest's digests that says that a set was drawn with it."""
ERRORS = {"sqnr_embeddings_db": "over all", "sqnr_lowest_db": "lowest"}


def sentence_of_encoders(body: Mapping[str, Any]) -> str:
    """How far embeddings are from full precision's. body: of the artifact."""
    widths = "W8A8" if body["bits"] == 8 else f"weights of {body['bits']} bits"
    parts = [
        f"{name} " + ", ".join(f"{says} {cell(key, found[key])}" for key, says in ERRORS.items())
        for name, found in body["fidelity"].items()
    ]
    return (
        f"prompts encoded with {widths}: SQNR in dB of the embeddings of {body['prompts']} prompts "
        f"to full precision's: {'; '.join(parts)}"
    )


def note_of_encoders(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same among what there is to say of a set (metrics/checks.py)."""
    says = sentence_of_encoders(body)
    return {"set": "quantized", "what": KIND, "count": body["prompts"], "says": says}
