"""metrics.json as a record that grows: what was measured in one protocol, at whatever time.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..store.digests import flat

PAIRED = ("cvvdp", "lpips")
"""Metrics of pairs of images."""
FEATURELESS = (*PAIRED, "clip")
"""Metrics that need neither the feature network nor a reference."""
METRICS = ("fid", "sfid", "fid_infinity", "isc", "kid", "prc", *FEATURELESS)
"""What can be asked for by name, in torch-fidelity's words where it has some."""
UNREFERENCED = {"isc", *FEATURELESS}
OPTIONAL = {"network_sha256": "network", "reference_sha256": "reference"}
"""Digests that only distances need -> what they are of; None where none was measured."""
WEIGHTS = ("lpips_sha256", "clip_sha256")
"""Digests of what metrics on request are computed with; None where they were not asked for."""
FIXED = (
    *("version", "model", "artifact", "num_samples", "seeds", "sets"),
    *("sampling", "correction", "bootstrap_seed"),
)
"""Keys of a protocol that every number depends on."""
COMPARABLE = (
    *("model", "num_samples", "seeds", "sampling", "bootstrap_seed"),
    *OPTIONAL,
)
"""Keys of a protocol in which all runs of one table agree."""
LATER = ("image_size", "resize", "pixel_range")
"""Such keys that records of earlier versions lack: they agree with any."""
REMARKED = ("version", "backend", "device", "libraries", "machine")
"""Keys that change numbers by rounding at most: runs that differ in them are compared."""


def same_protocol(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether numbers of both protocols may stand in one record."""
    fixed = all(key in one and one[key] == other.get(key) for key in FIXED)
    return fixed and all(
        one.get(key) == other.get(key) or None in (one.get(key), other.get(key))
        for key in (*OPTIONAL, *WEIGHTS)
    )


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What keeps runs of two protocols out of one table: dotted key -> both values."""
    known = [key for key in LATER if key in one and key in other]
    asked = [key for key in WEIGHTS if one.get(key) and other.get(key)]
    return _unequal(one, other, [*COMPARABLE, *known, *asked])


def remarked(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The same of what does not keep them out, and is worth a line."""
    return _unequal(one, other, [key for key in REMARKED if key in one and key in other])


def _unequal(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in keys:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            a, b = flat(a, f"{key}."), flat(b, f"{key}.")
            found |= {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}
        elif a != b:
            found[key] = (a, b)
    return found


def grown(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json with what an earlier one of the same protocol holds beside it.

    Numbers that both have are the present ones. Another protocol: the present one alone.
    """
    before = earlier.get("protocol", {})
    if not same_protocol(before, now["protocol"]):
        return dict(now)
    merged = dict(now)
    merged["protocol"] = protocol = _filled(now["protocol"], before)
    measured = {*before["metrics"], *now["protocol"]["metrics"]}
    protocol["metrics"] = [name for name in METRICS if name in measured]
    paired = (now["fidelity"].get("feature_distance"), earlier["fidelity"].get("feature_distance"))
    protocol["left_out"] = {
        name: why
        for name, why in now["protocol"]["left_out"].items()
        if name not in measured and not (name == "distance" and any(paired))
    }
    for name in ("full", "quantized", "fidelity"):
        merged[name] = _filled(now[name], earlier[name])
    for key in ("changes", "per_seed", "intervals"):
        both = [m["fidelity"].get(key) or {} for m in (earlier, now)]
        if any(both):
            merged["fidelity"][key] = {**both[0], **both[1]}
    notes = {(note["set"], note["what"]) for note in now.get("checks", ())}
    others = (n for n in earlier.get("checks", ()) if (n["set"], n["what"]) not in notes)
    return {**merged, "checks": [*now.get("checks", ()), *others]}


def _filled(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of now, with values of before in place of None."""
    return {key: before.get(key) if value is None else value for key, value in now.items()}
