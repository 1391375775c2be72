"""What --bits says."""

from __future__ import annotations

import pytest

from qncd_cli.config.widths import bits_overrides, parse_widths
from qncd_cli.errors import ConfigError


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


def test_weights_alone_have_a_name_of_their_own_here():
    """16 bits of inputs are integers; nobody who means floating point gets them unawares."""
    for text in ("w4a16", "W8A16"):
        with pytest.raises(ConfigError, match=f"--bits {text}: .*two bytes.*w[48]a32") as caught:
            bits_overrides(text)
        assert caught.value.exit_code == 3
    assert bits_overrides("w4a32")[1] == "quantization.activations.bits=32"
