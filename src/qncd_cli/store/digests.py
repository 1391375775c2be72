"""Digests: one spelling of plain values, its short digest, and the differences of two trees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SHOWN = 60
"""Characters of a value in a sentence."""


def canonical_json(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted keys; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def differing(
    before: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[str]:
    """A phrase "dotted.key: old -> new" for every leaf in which two trees differ.

    names: what beginnings of keys are called instead; the longest that fits is taken.
    """
    old, new = flat(before), flat(now)
    phrases = []
    for key in {**new, **old}:
        if old.get(key) != new.get(key):
            values = [spelled(leaves.get(key)) for leaves in (old, new)]
            said = "another one" if values[0] == values[1] else " -> ".join(values)
            phrases.append(f"{_named(key, names or {})}: {said}")
    return phrases


def _named(key: str, names: Mapping[str, str]) -> str:
    fitting = [n for n in names if key == n or key.startswith(f"{n}.")]
    longest = max(fitting, key=len, default=None)
    return key if longest is None else names[longest] + key.removeprefix(longest)


def spelled(value: Any) -> str:
    """A plain value in a sentence: YAML's words, long ones cut."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    text = " ".join(text.split()) or '""'
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
