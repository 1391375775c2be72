"""One name, unit and direction for every number, and numbers as people read them."""

from __future__ import annotations

import math

import pytest

from qncd_cli.vocabulary import (
    NUMBERS,
    SECTIONS,
    TERMS,
    cell,
    heading,
    interval,
    megabytes,
    number,
    phrase,
    said,
)


def test_no_two_numbers_share_a_heading_or_a_key():
    headings = [heading(key) for key in NUMBERS]
    assert len(set(headings)) == len(headings) == sum(map(len, SECTIONS.values()))


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_has_a_name_and_a_sentence(key):
    known = NUMBERS[key]
    assert known.name and known.says.endswith(".") and known.better in ("up", "down", "")
    assert not any(character in known.name for character in ",|↑↓") or key.startswith(
        ("sqnr_", "psnr_")
    )


def test_headings_say_unit_and_direction():
    assert heading("psnr_db") == "PSNR, dB ↑"
    assert heading("bytes") == "size, MB ↓"
    assert heading("share_of_float32") == "of float32, % ↓"
    assert heading("num_samples") == "samples"


def test_sizes_are_megabytes_of_a_million_and_shares_are_per_cent():
    assert megabytes(44_000_000) == "44.00 MB" and megabytes(3_241_000) == "3.241 MB"
    assert megabytes(48_750_000_000) == "48,750 MB" and megabytes(512) == "0.000512 MB"
    assert said("share_of_float32", 0.1458) == "14.6 %"
    assert phrase("share_of_float32", 0.1458) == "14.6 % of float32"
    assert phrase("bytes", 7_120_000) == "size 7.120 MB"
    assert cell("bit_operations", 1.5e12) == "1,500" and heading("bit_operations").endswith("G ↓")


def test_what_is_missing_and_what_is_identical_has_a_word():
    assert [cell("psnr_db", value) for value in (None, math.inf, 200.0, 28.214)] == [
        "–", "identical", "identical", "28.21",
    ]  # fmt: skip
    assert cell("feature_distance_to_full", "1.2 [1.0, 1.4]") == "1.2 [1.0, 1.4]"


def test_numbers():
    shown = [12345.6, 123.45, 12.345, 1.2345, 0.00012345, 0.0, -2.5, 1500, True, -math.inf]
    assert [number(value) for value in shown] == [
        "12,346", "123.5", "12.35", "1.234", "0.000123", "0", "-2.500", "1,500", "yes", "−∞",
    ]  # fmt: skip
    assert number(math.nan) == "not a number"


def test_intervals():
    assert interval({"value": 1.25, "low": 1.1, "high": 1.4}) == "1.250 [1.100, 1.400]"
    assert interval({"value": 1.25, "low": None, "high": None}) == "1.250"
    assert interval(None) is None and interval({"value": None}) is None


def test_a_newcomers_terms_are_a_sentence_each():
    assert {"SQNR", "PSNR", "intra noise", "inter noise"} <= TERMS.keys()
    assert all(text.endswith(".") and text.count(".") == 1 for text in TERMS.values())
