"""What --bits says."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MODEL

from qncd_cli.config.loading import resolved
from qncd_cli.config.widths import bits_overrides, parse_widths
from qncd_cli.errors import ConfigError
from qncd_cli.spec import FLOAT_BITS


def test_an_option_says_widths_or_full_precision():
    assert parse_widths("w4a8") == (4, 8)
    assert parse_widths("fp") is None
    for text in ("w4", "w4a9", ""):
        with pytest.raises(ConfigError, match=f"--bits {text}: expected widths like w4a8, or fp"):
            parse_widths(text)


def test_widths_become_overrides_and_full_precision_does_not():
    weights, activations = "quantization.weights.bits=4", "quantization.activations.bits=8"
    assert bits_overrides("w4a8") == (weights, activations)
    with pytest.raises(ConfigError, match="--bits fp: quantizes nothing"):
        bits_overrides("fp")


def test_weights_alone_leave_every_input_in_floating_point():
    """As w4a16 is read everywhere; 16 bits by their own key stay integers of two bytes."""
    for text, bits in (("w4a16", 4), ("W8A16", 8)):
        config = resolved(MODEL, "test", Path(), bits_overrides(text))
        assert config.quantization.widths == (bits, FLOAT_BITS)
        attention = config.quantization.attention
        assert attention.bits == attention.probabilities_bits == FLOAT_BITS
    two_bytes = resolved(MODEL, "test", Path(), ("quantization.activations.bits=16",))
    assert two_bytes.quantization.widths.activations == 16
    for text in ("w4a15", "w9a16", "w4a016"):
        with pytest.raises(ConfigError, match=f"--bits {text}: expected widths like w4a8"):
            bits_overrides(text)


def test_a_tables_widths_are_widths_alone():
    with pytest.raises(ConfigError, match="--bits w4a16: .*attention.*w4a32") as caught:
        parse_widths("w4a16")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
