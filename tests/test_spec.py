"""Widths as they are written and shown."""

from __future__ import annotations

import pytest

from qncd_cli.spec import Widths


def test_widths_are_read_as_they_are_written():
    assert Widths.parse("w4a8") == Widths(4, 8) == (4, 8)
    assert Widths.parse("W32A6") == (32, 6)
    assert str(Widths.parse("W4A8")) == "w4a8"


@pytest.mark.parametrize("text", ["w4", "a8w4", "w1a8", "w4a9", "w4a15", "w4a8x", "fp", ""])
def test_what_are_no_widths_is_refused(text):
    with pytest.raises(ValueError, match=f"^{text}: widths are written like w4a8"):
        Widths.parse(text)


def test_widths_are_shown_with_their_means():
    assert Widths(4, 8).label == Widths(4, 8).described(None) == "W4A8"
    assert Widths(4, 8).described((6.04, 8.96)) == "W4A8 (6.0 / 9.0)"
