"""How far embeddings are from full precision's: which of them count."""

from __future__ import annotations

import math

import pytest
import torch

from qncd_cli.models.text import Encoded
from qncd_cli.stages.text_encoders import fidelity
from qncd_cli.vocabulary import IDENTICAL_DB

HIDDEN, MASK = "encoder_hidden_states", "encoder_attention_mask"


def encoded(hidden, negative=None, **more) -> Encoded:
    null = None if negative is None else {HIDDEN: negative}
    return Encoded({HIDDEN: hidden, **more}, null)


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
