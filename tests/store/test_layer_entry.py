"""Entries of layers and attention modules: as objects, and as artifacts spell them."""

from __future__ import annotations

import json

import pytest

from qncd_cli.spec import Widths
from qncd_cli.store.layer_entry import (
    AttentionEntry,
    EstimatedError,
    LayerEntry,
    Reconstruction,
    layer_entries,
)

PLAIN = {
    "kind": "conv",
    "weight_shape": [2, 3, 5, 5],
    "in_channels": 3,
    "weight_bits": 4,
    "activation_bits": 8,
    "observer": "mse",
    "smoothed": True,
    "shifted": False,
    "bias": True,
    "bias_corrected": False,
    "rounding": "gptq",
    "note": "",
}
FULL = {
    **PLAIN,
    "relative_output_error": 0.25,
    "sensitivity": {"2": 0.5, "4": 0.125},
    "estimated_error": {"input": 0.5, "weight": 0.75},
    "reconstruction": {
        "block": "mid_block",
        "relative_output_error_before": 0.5,
        "relative_output_error_after": 0.25,
        "kept": True,
    },
}


@pytest.mark.parametrize("body", [PLAIN, FULL], ids=["plain", "full"])
def test_an_entry_is_written_as_it_was_read(body):
    entry = LayerEntry.from_body(json.loads(json.dumps(body)))
    assert entry.to_body() == body


def test_what_an_entry_says_has_types():
    entry = layer_entries({"layers": {"conv": FULL}})["conv"]
    assert entry.widths == Widths(4, 8)
    assert (entry.weights, entry.in_features) == (150, 75)
    assert entry.sensitivity == {2: 0.5, 4: 0.125}
    assert entry.estimated_error == EstimatedError(input=0.5, weight=0.75)
    assert entry.reconstruction == Reconstruction("mid_block", 0.5, 0.25, kept=True)


def test_keys_that_are_no_fields_are_left_alone_and_missing_ones_are_not():
    assert LayerEntry.from_body({**PLAIN, "of_another_version": 1}) == LayerEntry.from_body(PLAIN)
    with pytest.raises(TypeError, match="in_channels"):
        LayerEntry.from_body({k: v for k, v in PLAIN.items() if k != "in_channels"})


def test_an_attention_module_is_written_as_it_was_read():
    body = {"bits": 8, "probabilities_bits": 16, "observer": "minmax"}
    assert AttentionEntry.from_body(body).to_body() == body
