"""Quantized layers as ComfyUI's files can hold them.

The formats of linear layers (comfy/ops.py of github.com/Comfy-Org/ComfyUI; the package
comfy-kitchen, Apache-2.0), each named by a JSON object in the uint8 tensor `<layer>.comfy_quant`:

- int8_tensorwise: `weight` int8 [O, I], `weight_scale` float32 [O, 1], W = weight * scale; with
  convrot, W is of inputs rotated in groups of convrot_groupsize by quant/rotation.py's matrix.
- asym_w4a8_int8: `weight` int8 [O, I / 2], two codes to a byte, low nibble first;
  `weight_codebook` float32 [16], what the codes stand for; `weight_s_rel` float8_e4m3 [O, I / 16],
  `weight_s_channel` float32 [O]: W = round(codebook[code] * s_rel) * s_channel, always rotated.

Both quantize every row of the input by its own largest magnitude to 8 bits, unless
full_precision_matrix_mult is set. Nothing else is quantized there, convolutions least of all: what
no format holds exactly is a float weight, rounded to bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant.layers import QuantizedLayer
from ..quant.rotation import rotate
from ..quant.smoothing import SmoothingFactor
from ..spec import FLOAT_BITS

INT8, W4A8, FLOAT = "int8_tensorwise", "asym_w4a8_int8", "bfloat16"
MARK = "comfy_quant"
NIBBLES = 16
"""Values that 4 bits stand for, and weights of a group that has a scale."""
ROW_MAX = 127.0
"""Largest code of a row of inputs."""
SMALLEST_ROW_SCALE = 1e-30


@dataclass(frozen=True)
class Held:
    """A layer, or several that the file joins along their outputs.

    format: INT8, W4A8 or FLOAT. why: what keeps it from being smaller, empty for nothing.
    codes: int8 [O, I], q - zero_point; scale: [O]; both None of FLOAT. rotation: channels of a
    group, 0 for none. full_inputs: inputs have more than 8 bits. zero_point: the one of all
    outputs (W4A8). weight: float32 [O, ...] of FLOAT, in the layer's own basis.
    """

    format: str
    why: str = ""
    codes: Tensor | None = None
    scale: Tensor | None = None
    rotation: int = 0
    full_inputs: bool = False
    zero_point: int = 0
    weight: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The weight that a reader makes of it, float32, in the layer's own basis."""
        if self.weight is not None:
            return self.weight.to(torch.bfloat16).float()
        weight = self.rotated()
        return rotate(weight, self.rotation) if self.rotation else weight

    def rotated(self) -> Tensor:
        """codes * scale, float32: the weight of rotated inputs."""
        assert self.codes is not None and self.scale is not None
        return self.codes.float() * self.scale.reshape(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by the ends of their names."""
        if self.weight is not None:
            return {"weight": self.weight.to(torch.bfloat16)}
        assert self.codes is not None and self.scale is not None
        said: dict[str, Any] = {"format": self.format}
        if self.format == W4A8:
            said |= {"group_size": NIBBLES, "convrot_groupsize": self.rotation}
            codes = (self.codes + self.zero_point).to(torch.uint8)
            groups = self.codes.shape[1] // NIBBLES
            found = {
                "weight": (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8),
                "weight_codebook": torch.arange(NIBBLES).float() - self.zero_point,
                "weight_s_rel": torch.ones(len(codes), groups).to(torch.float8_e4m3fn),
                "weight_s_channel": self.scale,
            }
        else:
            if self.rotation:
                said |= {"convrot": True, "convrot_groupsize": self.rotation}
            found = {"weight": self.codes, "weight_scale": self.scale.reshape(-1, 1)}
        if self.full_inputs:
            said["full_precision_matrix_mult"] = True
        mark = json.dumps(said, separators=(",", ":")).encode()
        return {**found, MARK: torch.tensor(list(mark), dtype=torch.uint8)}


def held(layer: QuantizedLayer) -> Held:
    """What the file holds of a layer's weight."""
    why = _why_float(layer)
    if why:
        factor = layer.factor if layer.smoothing is not None else None
        weight = layer.float_weight()
        return Held(FLOAT, why, weight=weight if factor is None else factor.unfold(weight))
    full = layer.activation_bits > 8
    codes, scale, rotation = layer.integer_weight(), layer.weight_scale, layer.rotation
    if layer.weight_bits > 4 or layer.weight_bits < 4:
        why = "" if layer.weight_bits == 8 else f"codes of {layer.weight_bits} bits take a byte"
        return Held(INT8, why, codes, scale, rotation, full)
    zero_points = layer.weight_zero_point
    assert zero_points is not None
    why = "codes of 4 bits take a byte: "
    if not rotation:
        return Held(INT8, f"{why}{W4A8} is for rotated inputs", codes, scale, 0, full)
    if not (zero_points == zero_points[0]).all() or codes.shape[1] % NIBBLES:
        why += f"{W4A8} has one codebook for all outputs, and groups of {NIBBLES} inputs"
        return Held(INT8, why, codes, scale, rotation, full)
    return Held(W4A8, "", codes, scale, rotation, full, int(zero_points[0]))


def _why_float(layer: QuantizedLayer) -> str:
    """Why no format holds a layer's codes; empty where one does."""
    if layer.is_conv:
        return "ComfyUI quantizes linear layers alone"
    if layer.weight_bits == FLOAT_BITS:
        return "its weight is float"
    if layer.weight_bits > 8:
        return "its codes have two bytes"
    if layer.smoothing is not None and not _rotated_alone(layer.factor):
        return "no format has factors of input channels"
    return ""


def _rotated_alone(factor: SmoothingFactor) -> bool:
    return factor.shift is None and bool((factor.factor == 1).all())


def bias_of(layer: QuantizedLayer) -> Tensor | None:
    """The bias without what a shift put into it, float32 [O], corrections averaged over the
    timestep groups."""
    bias = layer.bias
    if layer.bias_correction is not None:
        mean = layer.bias_correction.mean(0)
        bias = mean if bias is None else bias + mean
    if bias is None or layer.shift is None:
        return bias
    weight = layer.factor.unfold(layer.float_weight()).flatten(1)
    return bias - weight @ layer.shift


def joined(parts: Sequence[Held]) -> Held:
    """Layers that the file joins: quantized where all parts are, and alike."""
    if len(parts) == 1:
        return parts[0]
    kinds = {part.format == FLOAT for part in parts}
    alike = len({(part.rotation, part.full_inputs) for part in parts}) == 1
    if kinds == {False} and alike:
        codes, scales = [p.codes for p in parts], [p.scale for p in parts]
        why = next((part.why for part in parts if part.why), "")
        if any(part.format == W4A8 for part in parts):
            why = why or f"{W4A8} is not joined"
        return Held(
            INT8,
            why,
            torch.cat([c for c in codes if c is not None]),
            torch.cat([s for s in scales if s is not None]),
            parts[0].rotation,
            parts[0].full_inputs,
        )
    why = next((part.why for part in parts if part.format == FLOAT), "its parts are not alike")
    weights = [p.weight if p.weight is not None else p.dequantized() for p in parts]
    return Held(FLOAT, why, weight=torch.cat(weights))


def swapped(part: Held) -> Held:
    """The second half of the outputs first."""

    def swap(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat(x.chunk(2)[::-1])

    return Held(
        part.format,
        part.why,
        swap(part.codes),
        swap(part.scale),
        part.rotation,
        part.full_inputs,
        part.zero_point,
        swap(part.weight),
    )


def by_rows(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """What ComfyUI computes of a layer that it holds in integers: every row of the input (a token)
    has a scale of its own."""
    y = layer.smoothed(x.float())
    weight = layer.float_weight()
    if layer.activation_bits <= 8:
        scale = (y.abs().amax(-1, keepdim=True) / ROW_MAX).clamp(min=SMALLEST_ROW_SCALE)
        y = (y / scale).round().clamp(-ROW_MAX, ROW_MAX) * scale
    bias = bias_of(layer)
    bias = None if bias is None else bias.to(torch.bfloat16).float()
    return torch.nn.functional.linear(y, weight, bias).to(x.dtype)
