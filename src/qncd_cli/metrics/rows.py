"""metrics.json as rows of a table, for the terminal and for the report, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spec import Widths
from ..vocabulary import IDENTICAL_DB, NUMBERS, heading, said

SETS = {"images": "images", "full": "full precision", "quantized": "quantized"}
"""Objects of metrics.json that are sets, and what they are called."""
INCEPTION = "inception-v3-compat"
FIELDS = {
    "feature_distance": "fid",
    "spatial_distance": "sfid",
    "feature_distance_infinity": "fid_infinity",
    "kernel_distance": "kid",
    "class_score": "inception_score",
}
"""Entries that name their network -> the field's own names where it is Inception."""
OF_SETS = (
    *FIELDS,
    *(
        "fid",
        "sfid",
        "inception_score",
        "kid",
        "precision",
        "recall",
        "clip_score",
        "class_agreement",
    ),
)
OF_FIDELITY = (
    *("sqnr_latents_db", "sqnr_median_db", "sqnr_q05_db"),
    *("psnr_db", "psnr_median_db", "psnr_q05_db", "changed"),
    *("ssim", "ssim_median", "ssim_q05"),
    *("cvvdp_jod", "cvvdp_jod_median", "cvvdp_jod_q05"),
    *("lpips", "lpips_median", "lpips_q95"),
)
"""Keys of `fidelity`, shown in the column of the quantized set, which they are about."""
POOLED = ("sqnr_latents_db", "psnr_db")
"""Null in JSON where the sets are identical."""
CHECKPOINTS = (".ckpt", ".safetensors")


@dataclass(frozen=True)
class Row:
    """One number of all sets. key: of the vocabulary; values: a number, text, or an entry {value,
    low, high}, one for each set."""

    key: str
    label: str
    values: list[Any]


def columns(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the sets that were measured."""
    return [name for key, name in SETS.items() if _mapping(metrics.get(key))]


def rows(metrics: Mapping[str, Any]) -> list[Row]:
    """What was measured, in the order of reading; numbers that no set has are left out."""
    sets = [_mapping(metrics.get(key)) for key in SETS if _mapping(metrics.get(key))]
    found: list[Row] = []
    for key in OF_SETS:
        row = _of_sets(key, [_value(entry, key) for entry in sets])
        if row is not None and row.label not in [earlier.label for earlier in found]:
            found.append(row)
    fidelity = _mapping(metrics.get("fidelity"))
    before: list[Any] = [None] * (len(sets) - 1)
    distance = _mapping(fidelity.get("feature_distance"))
    if distance.get("value") is not None:
        key = "feature_distance_to_full"
        found.append(Row(key, _named(key, distance), [*before, distance]))
    for key in OF_FIDELITY if fidelity else ():
        value = fidelity.get(key)
        if value is None and key in POOLED and key in fidelity:
            value = float("inf")
        if value is not None:
            found.append(Row(key, heading(key), [*before, _with_interval(fidelity, key, value)]))
    return found + _of_size(metrics)


def _value(entry: Mapping[str, Any], key: str) -> Any:
    """A set's number, with its interval where the object of another key has that."""
    bounded = _mapping(entry.get("precision_recall")).get(key)
    return entry.get(key) if bounded is None else bounded


def _with_interval(fidelity: Mapping[str, Any], key: str, value: float) -> Any:
    """The number as an entry {value, low, high} where an interval says something of it."""
    known = _mapping(_mapping(fidelity.get("intervals")).get(key))
    low, high = known.get("low"), known.get("high")
    if low is None or high is None or low == high or not value < IDENTICAL_DB:
        return value
    return {"value": value, "low": low, "high": high}


def _of_sets(key: str, values: list[Any]) -> Row | None:
    if all(value is None for value in values):
        return None
    entry = next((value for value in values if isinstance(value, Mapping)), {})
    if entry.get("network") == INCEPTION:
        key = FIELDS.get(key, key)
    elif key == "feature_distance":
        key = "feature_distance_to_reference"
    return Row(key, _named(key, entry), values)


def _named(key: str, entry: Mapping[str, Any]) -> str:
    """The heading, with the network where that is not Inception, whose numbers have own names."""
    source = entry.get("name") or entry.get("network")
    if not source or entry.get("network") == INCEPTION:
        return heading(key)
    name = NUMBERS[key].name
    return heading(key).replace(name, f"{name} ({source})", 1)


def _of_size(metrics: Mapping[str, Any]) -> list[Row]:
    size, made = _mapping(metrics.get("bytes")), _mapping(metrics.get("quantization"))
    found = []
    if made:
        found.append(Row("bits", "bits", ["float32", bits(made)]))
    if size:
        full, quantized = size["full"], size["quantized"]
        share = said("share_of_float32", quantized / full)
        found.append(Row("bytes", heading("bytes"), [full, quantized]))
        name = NUMBERS["share_of_float32"].name
        found.append(Row("share_of_float32", f"{name} ↓", [None, share]))
    return found


def bits(made: Mapping[str, Any]) -> str:
    """W4A8 (6.0 / 9.0) of a `quantization` of metrics.json, or of a row of an ablation."""
    mean = made.get("mean_weight_bits"), made.get("mean_input_bits")
    known = (mean[0], mean[1]) if mean[0] is not None and mean[1] is not None else None
    return Widths(made["weights"], made["activations"]).described(known)


def short_name(source: str) -> str:
    """A model's name without where it is: fashion-ldm, stable-diffusion-v1-4, cin256-v2."""
    path = Path(source.partition(":")[2] or source)
    return path.parent.name or path.stem if path.suffix in CHECKPOINTS else path.name


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
