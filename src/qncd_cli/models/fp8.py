"""Files whose weights have eight bits, as ComfyUI and its tools write them, in plain numbers again.

Two kinds are about. Most are a plain cast: each number is what it says. Scaled ones have a number
beside each layer by which its weight is multiplied: `<layer>.scale_weight` in a file marked by a
tensor `scaled_fp8`, or `<layer>.weight_scale` of a layer that `<layer>.comfy_quant` or the header's
`_quantization_metadata` names (comfy/utils.py and QUANTIZATION.md of github.com/Comfy-Org/ComfyUI).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .compvis.file import some_tensors

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")
MARK, LAYER_MARK, HEADER = "scaled_fp8", ".comfy_quant", "_quantization_metadata"
BESIDE = (*SCALES, ".scale_input", ".input_scale", LAYER_MARK)
"""How names end of what stands beside a weight."""
_PLAIN = "give the model in float32, bfloat16, float16 or fp8"


def plain_numbers(
    file: str, tensors: dict[str, Tensor], header: dict[str, str], parts: Collection[str]
) -> dict[str, Tensor]:
    """The tensors, those of eight bits in bfloat16 (a plain cast, exact) or times their scale in
    float32; without marks and scales.

    header: of a safetensors file. parts: what names of one part of a model begin with; whether a
    weight ought to have a scale is decided in each by itself.
    Raises ModelError for a part that is scaled but for some of its weights, and for integers.
    """
    marked = {name.removesuffix(LAYER_MARK) for name in tensors if name.endswith(LAYER_MARK)}
    formats = {layer: _format(file, tensors[layer + LAYER_MARK]) for layer in sorted(marked)}
    formats |= _header_formats(file, header)
    for layer, kind in formats.items():
        if not kind.startswith("float8_"):
            raise ModelError(f"{file}: {layer} is quantized already ({kind})", _PLAIN)
    integers = [n for n, t in tensors.items() if _is_weight(n, t) and not t.is_floating_point()]
    if integers:
        kind = str(tensors[integers[0]].dtype).removeprefix("torch.")
        raise ModelError(f"{file}: {some_tensors(f'in {kind}', integers)}", _PLAIN)
    own = [name for name in tensors if name.endswith(SCALES)]
    scaled = {_part(name, parts) for name in own + list(formats)}
    scaled |= {_part(name, parts) for name in tensors if name.rpartition(".")[2] == MARK}
    found, missing = {}, []
    for name, tensor in tensors.items():
        if name.endswith(BESIDE) or name.rpartition(".")[2] == MARK:
            continue
        scale = _scale(name, tensors)
        if scale is not None:
            found[name] = tensor.float() * _fitting(file, name, tensor, scale)
        elif tensor.dtype not in FLOAT8:
            found[name] = tensor
        elif _is_weight(name, tensor) and _part(name, parts) in scaled:
            missing.append(name)
        else:
            found[name] = tensor.to(torch.bfloat16)
    if missing:
        raise ModelError(
            f"{file}: is scaled fp8, {some_tensors('without a scale', missing)}",
            "get the file again, or give the model in bfloat16 or float16",
        )
    return found


def _is_weight(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and name.endswith(".weight")


def _part(name: str, parts: Collection[str]) -> str:
    """What a name begins with; "" where it begins like none of the parts."""
    return max((part for part in parts if name.startswith(part)), key=len, default="")


def _scale(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    layer, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    return next((tensors[layer + end] for end in SCALES if layer + end in tensors), None)


def _fitting(file: str, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """A scale in float32 that multiplies the weight: one number, or one a row."""
    if weight.dtype not in FLOAT8:
        raise ModelError(f"{file}: {name} has a scale but is {weight.dtype}", _PLAIN)
    if scale.numel() not in (1, len(weight)):
        raise ModelError(
            f"{file}: the scale of {name}, {list(weight.shape)}, is {list(scale.shape)}",
            f"one number a tensor or a row is read; {_PLAIN}",
        )
    return scale.float().reshape(-1, *(1,) * (weight.ndim - 1))


def _format(file: str, mark: Tensor) -> str:
    """The format that a layer's mark names: JSON in bytes."""
    return _named(file, bytes(mark.to(torch.uint8).flatten().tolist()))


def _header_formats(file: str, header: dict[str, str]) -> dict[str, str]:
    if HEADER not in header:
        return {}
    try:
        layers = json.loads(header[HEADER])["layers"]
        return {str(layer): str(entry["format"]) for layer, entry in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: its {HEADER} cannot be read", "get the file again") from error


def _named(file: str, text: bytes) -> str:
    try:
        entry: Any = json.loads(text)
        return str(entry["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: a {LAYER_MARK} cannot be read", "get the file again") from error
