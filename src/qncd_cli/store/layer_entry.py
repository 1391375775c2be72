"""What the quantized artifact says of a layer, and of an attention module, beside their tensors.

quantize writes entries, the forecast predicts them, everything else reads them; in the artifact's
body each is an object with the fields' names, those left out that are None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..spec import Widths


@dataclass(frozen=True)
class EstimatedError:
    """Relative squared error of the prediction that rounding a layer makes: what its extra bits
    were decided by."""

    input: float
    weight: float


@dataclass(frozen=True)
class Reconstruction:
    """What learning the rounding of the layer's block did to the block's output on held-out
    trajectories, and whether the result was kept."""

    block: str
    relative_output_error_before: float
    relative_output_error_after: float
    kept: bool


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the quantized artifact.

    kind: conv or linear. weight_shape: [O, C_in, ...] of the weight before it is packed.
    observer: what chose the input's range. smoothed, shifted, bias, bias_corrected: whether there
    are tensors of these names; rotated: whether there is a rotation's. rounding: none, nearest,
    gptq, adaround or brecq; note: what fell back, or empty. relative_output_error: what GPTQ left
    of the output's power, on calibration inputs. sensitivity: error of the prediction by weight
    bits, where a budget chose them.
    """

    kind: str
    weight_shape: tuple[int, ...]
    in_channels: int
    weight_bits: int
    activation_bits: int
    observer: str
    smoothed: bool
    shifted: bool
    bias: bool
    bias_corrected: bool = False
    rotated: bool | None = None
    rounding: str = "none"
    note: str = ""
    relative_output_error: float | None = None
    sensitivity: Mapping[int, float] | None = None
    estimated_error: EstimatedError | None = None
    reconstruction: Reconstruction | None = None

    @property
    def widths(self) -> Widths:
        return Widths(self.weight_bits, self.activation_bits)

    @property
    def in_features(self) -> int:
        """Weights of one output channel."""
        return math.prod(self.weight_shape[1:])

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    def to_body(self) -> dict[str, Any]:
        """The entry as it is written."""
        body = {name: value for name, value in asdict(self).items() if value is not None}
        body["weight_shape"] = list(self.weight_shape)
        if self.sensitivity is not None:
            body["sensitivity"] = {str(bits): error for bits, error in self.sensitivity.items()}
        return body

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> LayerEntry:
        """An entry as it was read; keys that are no field's are left alone. Raises TypeError where
        one is missing or of another type."""
        known = {field.name: str(field.type) for field in fields(cls)}
        found = {name: value for name, value in body.items() if name in known}
        _check_types(found, known)
        found["weight_shape"] = shape = tuple(body.get("weight_shape", ()))
        if len(shape) < 2 or not all(type(n) is int and n > 0 for n in shape):
            raise TypeError(f"weight_shape {shape}")
        if type(found.get("rotated", True)) is not bool:
            raise TypeError(f"rotated is {found['rotated']!r}")
        if "sensitivity" in found:
            found["sensitivity"] = {int(bits): e for bits, e in found["sensitivity"].items()}
        if "estimated_error" in found:
            found["estimated_error"] = EstimatedError(**found["estimated_error"])
        if "reconstruction" in found:
            found["reconstruction"] = Reconstruction(**found["reconstruction"])
        return cls(**found)


@dataclass(frozen=True)
class AttentionEntry:
    """One attention module of the quantized artifact.

    bits: of the query, the key and the value; probabilities_bits: of the softmax's output;
    observer: what chose their ranges.
    """

    bits: int
    probabilities_bits: int
    observer: str

    def to_body(self) -> dict[str, Any]:
        """The entry as it is written."""
        return asdict(self)

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> AttentionEntry:
        """An entry as it was read. Raises TypeError for a body of another form."""
        _check_types(body, {field.name: str(field.type) for field in fields(cls)})
        return cls(**body)


def _check_types(body: Mapping[str, Any], types: Mapping[str, str]) -> None:
    """types: of the fields, as they are written in this file. Raises TypeError."""
    for name, value in body.items():
        wanted = {"str": str, "int": int, "bool": bool}.get(types.get(name, ""))
        if wanted is not None and type(value) is not wanted:
            raise TypeError(f"{name} is {value!r}")


def layer_entries(body: Mapping[str, Any]) -> dict[str, LayerEntry]:
    """Layers of a quantized artifact's body by name."""
    return {name: LayerEntry.from_body(entry) for name, entry in body["layers"].items()}


def attention_entries(body: Mapping[str, Any]) -> dict[str, AttentionEntry]:
    """Attention modules of a quantized artifact's body by name."""
    return {name: AttentionEntry.from_body(entry) for name, entry in body["attention"].items()}


def bodies(entries: Mapping[str, LayerEntry | AttentionEntry]) -> dict[str, dict[str, Any]]:
    """Entries by name as they are written."""
    return {name: entry.to_body() for name, entry in entries.items()}
