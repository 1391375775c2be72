"""Forecast of text encoders in integers: their artifact, and what making it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config.schema import Config
from ..ptq import text_encoders
from ..ptq.cost import Cost
from ..ptq.layer_plan import LayerPlan
from ..spec import FLOAT_BITS
from ..store.artifacts import Artifact
from ..store.layer_entry import LayerEntry, bodies
from .artifacts import SOME_FLOAT, blank
from .shapes import Shapes

WHAT = "quantizing the text encoders"
KEPT = 4
"""Copies of all embeddings that are compared: joined and by encoder, before and after."""
FIGURES = {"sqnr_embeddings_db": SOME_FLOAT, "sqnr_lowest_db": SOME_FLOAT}


def artifact(config: Config, shapes: Shapes) -> Artifact | None:
    """None where none is made, or nothing describes the text encoders."""
    plans = _plans(config, shapes)
    if not plans:
        return None
    assert shapes.text is not None
    encoders = [name for name, _ in shapes.text.named_children()]
    body = {
        "layers": bodies({plan.name: _entry(plan) for plan in plans}),
        "attention": {},
        "groups": 1,
        "group_bounds": [],
        "bits": config.text_encoders.bits,
        "float_bytes": 4 * sum(plan.layer.weight.numel() for plan in plans),
        "source": shapes.source,
        "prompts": shapes.classes,
        "fidelity": dict.fromkeys(("hidden states", "pooled", *encoders), FIGURES),
    }
    return blank("text_encoders", body)


def cost(config: Config, shapes: Shapes, made: Artifact | None) -> dict[str, Cost]:
    """What making them takes, by what is done; nothing where none are. made: of `artifact`."""
    if made is None or shapes.text is None:
        return {}
    held = 4.0 * sum(p.numel() for p in shapes.text.parameters())
    held += sum(tensor.nbytes for tensor in made.tensors.values())
    prompts = min(shapes.classes, text_encoders.PROMPTS)
    tokens = shapes.tokens * (prompts + 1)  # a negative prompt
    encoders: Any = shapes.text.children()
    held += KEPT * 4.0 * tokens * sum(encoder.config.hidden_size for encoder in encoders)
    return {WHAT: text_encoders.cost(_plans(config, shapes), tokens, held)}


def _plans(config: Config, shapes: Shapes) -> list[LayerPlan]:
    bits = config.text_encoders.bits
    if bits is None or shapes.text is None:
        return []
    return text_encoders.plan_encoders(shapes.text, bits)


def _entry(plan: LayerPlan) -> LayerEntry:
    entry = plan.entry(smoothed=plan.activation_bits != FLOAT_BITS, shifted=False)
    return replace(entry, rounding="gptq", relative_output_error=SOME_FLOAT)
