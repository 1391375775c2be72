"""How far embeddings are from full precision's: which of them count."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers_pipelines import save

from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Encoded, Prompts
from qncd_cli.stages.text_encoders import embeddings, read_of
from qncd_cli.stages.text_encoders import fidelity as fidelity_of
from qncd_cli.vocabulary import IDENTICAL_DB

HIDDEN, MASK = "encoder_hidden_states", "encoder_attention_mask"


def encoded(hidden, negative=None, **more) -> Encoded:
    null = None if negative is None else {HIDDEN: negative}
    return Encoded({HIDDEN: hidden, **more}, null)


def fidelity(full: Encoded, other: Encoded) -> dict[str, dict[str, float]]:
    return fidelity_of(read_of(full), read_of(other))


def test_prompts_and_the_negative_one_count_and_the_lowest_is_told():
    full = torch.ones(2, 3, 4)
    other = full.clone()
    other[1] += 0.1
    found = fidelity(encoded(full, full[:1]), encoded(other, full[:1]))["hidden states"]
    assert found["sqnr_lowest_db"] == pytest.approx(20)
    assert found["sqnr_embeddings_db"] == pytest.approx(20 + 10 * math.log10(3))
    worse = fidelity(encoded(full, full[:1]), encoded(other, full[:1] * 2))["hidden states"]
    assert worse["sqnr_lowest_db"] == pytest.approx(0)


def test_what_a_denoiser_does_not_read_is_left_out():
    full, mask = torch.ones(1, 4, 2), torch.tensor([[1, 1, 0, 0]])
    other = full.clone()
    other[0, 2:] = 100
    more = {MASK: mask, "time_ids": torch.ones(1, 6)}
    found = fidelity(encoded(full, **more), encoded(other, **more))
    figures = {"sqnr_embeddings_db": IDENTICAL_DB, "sqnr_lowest_db": IDENTICAL_DB}
    assert found == {"hidden states": figures}


def test_pooled_embeddings_are_told_apart_and_zeros_have_no_error():
    """SDXL has zeros for no negative prompt."""
    full = {HIDDEN: torch.ones(1, 2, 2), "text_embeds": torch.ones(1, 4)}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
    other = {**full, "text_embeds": torch.full((1, 4), 1.1)}
    found = fidelity(Encoded(full, zeros), Encoded(other, zeros))
    assert found["hidden states"]["sqnr_lowest_db"] == IDENTICAL_DB
    assert found["pooled"]["sqnr_embeddings_db"] == pytest.approx(20, abs=1e-3)


def test_of_several_encoders_each_is_told_by_itself(tmp_path):
    """Joined along the tokens, one of small numbers would be lost beside one of large ones."""
    prompts = Prompts(("a red", "blue"), "bag")
    found = {}
    for kind in ("StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline"):
        source = save(kind, tmp_path / kind)
        text = load_model(str(source), prompts=prompts, keep_text=True).text
        found[kind] = embeddings(text)
        assert {len(rows) for rows in found[kind].values()} == {3}  # the negative one, too
        assert not any(encoder._forward_hooks for encoder in text.module.children())
    assert {*found["PixArtSigmaPipeline"]} == {"hidden states"}
    xl, both = found["StableDiffusionXLPipeline"], ("text_encoder", "text_encoder_2")
    joined = [torch.cat(rows, dim=-1) for rows in zip(*(xl[name] for name in both), strict=True)]
    read = xl["hidden states"]  # SDXL's negative prompt is encoded first
    assert all(torch.equal(*pair) for pair in zip(joined, [read[-1], *read[:-1]], strict=True))
    full = found["StableDiffusion3Pipeline"]
    assert {*full} == {"hidden states", "pooled", *both, "text_encoder_3"}
    worse = {**full, "text_encoder": [1.5 * row for row in full["text_encoder"]]}
    figures = fidelity_of(full, worse)
    assert figures["text_encoder"]["sqnr_embeddings_db"] == pytest.approx(20 * math.log10(2))
    assert figures["text_encoder_3"]["sqnr_lowest_db"] == IDENTICAL_DB
