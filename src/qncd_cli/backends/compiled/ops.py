"""The int8 backend inside a graph: what its layers become while it is traced.

A layer is two operators: quantization of its input, integer product. The product finds its layer by
name, as packed weights cannot enter a graph. `fusion` joins the quantization with the norm before
it, or opens it for the compiler, which fuses it with whatever comes before. Those operators that
are left are in kernels/.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...quant.affine import QParams, round_to_codes
from ...quant.attention import AttentionProducts
from ...quant.layers import QuantizedLayer
from ...quant.rotation import rotate
from ...quant.smoothing import smooth
from ...spec import activation_spec
from .. import int8
from . import native, upsampled_conv
from .group_norm import group_norm

_layers: weakref.WeakValueDictionary[str, QuantizedLayer] = weakref.WeakValueDictionary()


def register(layers: Mapping[str, QuantizedLayer]) -> None:
    """Let graphs call the layers by these keys, as long as they live."""
    for key, layer in layers.items():
        if _layers.get(key) is not layer:
            _layers[key] = layer
            weakref.finalize(layer, native.forget, key).atexit = False


@contextmanager
def traceable(module: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """In this block layers, group norms and attention of a denoiser compute for a tracer.

    The layers' packed codes, which only the products read, are out of sight meanwhile.
    """
    before = {key: (layer.compute, layer.weight) for key, layer in layers.items()}
    norms = [norm for norm in module.modules() if isinstance(norm, nn.GroupNorm) and norm.affine]
    products = [m for m in module.modules() if isinstance(m, AttentionProducts) and m.matmul]
    kernels = [(part, part.matmul) for part in products]
    try:
        for part in products:
            part.matmul, part.byte_attention = torch.ops.qncd.matmul, torch.ops.qncd.byte_attention
            part.attention = torch.ops.qncd.attention
        for norm in norms:
            norm.forward = functools.partial(_group_norm, norm)  # type: ignore[method-assign]
        for key, layer in layers.items():
            if int8.why_not(layer):
                continue  # simulated, in floating point that the compiler sees
            layer.compute = _traced(key)
            layer.weight = layer.weight.new_empty(0)
        yield
    finally:
        for norm in norms:
            del norm.forward
        for part, matmul in kernels:
            part.matmul, part.byte_attention, part.attention = matmul, None, None
        for key, layer in layers.items():
            layer.compute, layer.weight = before[key]


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return torch.ops.qncd.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _traced(key: str):
    def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
        """The same as int8.compute, in two operators."""
        bits, (scale, zero_point) = layer.activation_bits, layer.input_qparams()
        quantizer = (layer.smoothing, layer.shift, scale, zero_point, bits)
        y = rotate(x.float(), layer.rotation) if layer.rotation else x
        low, high = torch.ops.qncd.codes(y, layer.is_conv, *quantizer)
        operands = (low, high if bits > 8 else None, scale, zero_point, layer.bias_now())
        return torch.ops.qncd.multiply(*operands, key, x.dtype)

    return compute


# ------------------------------------------------------------------ the operators

_library = torch.library.Library("qncd", "DEF")
_PRODUCT = (
    "Tensor low, Tensor? high, Tensor low_scale, Tensor low_zero_point, Tensor? bias, str layer, "
    "ScalarType dtype"
)
_QUANTIZER = "Tensor? smoothing, Tensor? shift, Tensor scale, Tensor zero_point, int bits"
for schema in (
    f"codes(Tensor x, bool image, {_QUANTIZER}) -> (Tensor, Tensor)",
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> Tensor",
    "image_codes(Tensor[] parts, Tensor? embedding, Tensor? weight, Tensor? bias, "
    "Tensor? multiplier, Tensor? addend, int groups, float eps, bool silu, "
    f"{_QUANTIZER}) -> (Tensor, Tensor)",
    f"multiply({_PRODUCT}, bool upsampled=False) -> Tensor",
    "prepare(Tensor low, str layer, ScalarType dtype, bool upsampled) -> ()",
    "matmul(Tensor a, Tensor b) -> Tensor",
    "attention(Tensor query, Tensor key, Tensor value, float scale, int bits) -> Tensor",
    f"gated_codes(Tensor x, {_QUANTIZER}) -> (Tensor, Tensor)",
    f"gated_product_codes({_PRODUCT}, {_QUANTIZER}) -> (Tensor, Tensor)",
    "byte_attention(Tensor query, Tensor key, Tensor value, Tensor added, Tensor factor, int bits) "
    "-> (Tensor, Tensor)",
):
    _library.define(schema)
MULTIPLY = torch.ops.qncd.multiply.default
CODES = torch.ops.qncd.codes.default
GROUP_NORM = torch.ops.qncd.group_norm.default
GATED_CODES = torch.ops.qncd.gated_codes.default
GATED_PRODUCT_CODES = torch.ops.qncd.gated_product_codes.default
IMAGE_CODES = torch.ops.qncd.image_codes.default


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty([a.shape[0], a.shape[1], b.shape[2]], dtype=torch.int32)


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *others) -> Tensor:
    return query.new_empty([*query.shape[:3], value.shape[3]])


def codes(
    x: Tensor,
    image: bool,
    smoothing: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """x of any float type -> low and high bytes of its codes, the latter empty up to 8 bits."""
    y = x.float()
    if smoothing is not None:
        y = smooth(y, smoothing, 1 if image else -1, shift)
    if image:
        y = y.contiguous(memory_format=torch.channels_last)
    rounded = round_to_codes(y, QParams(scale, zero_point), activation_spec(bits))
    low, high = int8.in_bytes(rounded, bits)
    return low, low.new_empty(0) if high is None else high


def layer_of(key: str) -> QuantizedLayer:
    """The layer that graphs know by this key."""
    return _layers[key]


def _prepare(low: Tensor, layer: str, dtype: torch.dtype, upsampled: bool) -> None:
    """Packs the weights of a layer for inputs like this one, and outputs of that type."""
    prepare = upsampled_conv.prepare if upsampled else int8.prepare
    native.keep(layer, prepare(_layers[layer], low, dtype))


def _multiply_fake(
    low: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    layer: str,
    dtype: torch.dtype,
    upsampled: bool = False,
) -> Tensor:
    """Shape and memory order of the kernel's output."""
    called = _layers[layer]
    if not called.is_conv:
        return low.new_empty([*low.shape[:-1], called.weight_shape[0]], dtype=dtype)
    sides = [2 * side if upsampled else side for side in low.shape[2:]]
    return _image(low, int8.conv_output_shape(called, [*low.shape[:2], *sides]), dtype)


def _codes_fake(x: Tensor, image: bool, *quantizer) -> tuple[Tensor, Tensor]:
    low = _image(x, x.shape) if image else x.new_empty(x.shape, dtype=torch.uint8)
    return low, torch.empty_like(low) if quantizer[-1] > 8 else low.new_empty(0)


def _image_codes_fake(parts: list[Tensor], *others) -> tuple[Tensor, Tensor]:
    channels = sum(part.shape[1] for part in parts)
    low = _image(parts[0], [parts[0].shape[0], channels, *parts[0].shape[2:]])
    return low, torch.empty_like(low) if others[-1] > 8 else low.new_empty(0)


def _gated_codes_fake(x: Tensor, *quantizer) -> tuple[Tensor, Tensor]:
    low = x.new_empty([*x.shape[:-1], x.shape[-1] // 2], dtype=torch.uint8)
    return low, torch.empty_like(low) if quantizer[-1] > 8 else low.new_empty(0)


def _gated_product_codes_fake(*operands) -> tuple[Tensor, Tensor]:
    product, quantizer = operands[:-5], operands[-5:]
    return _gated_codes_fake(_multiply_fake(*product), *quantizer)


def _byte_attention_fake(query: Tensor, key: Tensor, value: Tensor, *others):
    sums = query.new_empty([*query.shape[:2], value.shape[2]], dtype=torch.int32)
    return sums, sums.new_empty(sums.shape[:2])


def _image(like: Tensor, shape, dtype: torch.dtype = torch.uint8) -> Tensor:
    order = torch.channels_last
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=order)


def _group_norm_fake(x: Tensor, *others) -> Tensor:
    return torch.empty_like(x)


_library.impl("prepare", _prepare, "CPU")
_library.impl("codes", codes, "CPU")
_library.impl("group_norm", group_norm, "CPU")
_FAKES: dict[str, Any] = {
    "codes": _codes_fake,
    "group_norm": _group_norm_fake,
    "image_codes": _image_codes_fake,
    "multiply": _multiply_fake,
    "matmul": _matmul_fake,
    "attention": _attention_fake,
    "gated_codes": _gated_codes_fake,
    "gated_product_codes": _gated_product_codes_fake,
    "byte_attention": _byte_attention_fake,
}
for name, fake in _FAKES.items():
    torch.library.register_fake(f"qncd::{name}", fake, lib=_library)
