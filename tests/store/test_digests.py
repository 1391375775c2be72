"""Digests of plain values."""

from __future__ import annotations

from qncd_cli.store.digests import differing, digest_of


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_trees_differ_in_named_keys_with_old_and_new_values():
    before = {"a": {"b": 1, "c": [1, 2]}, "gone": True, "same": 0.5, "text": "x " * 50}
    now = {"a": {"b": 2, "c": None}, "new": "gptq", "same": 0.5, "text": "x " * 49 + "y"}
    assert sorted(differing(before, now, {"a": "section", "a.b": "bits"})) == [
        "bits: 1 -> 2",
        "gone: true -> none",
        "new: none -> gptq",
        "section.c: [1, 2] -> none",
        "text: another one",
    ]
    assert differing(before, before) == []
