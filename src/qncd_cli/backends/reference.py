"""The simulate backend: fake quantization in float32. The oracle; slower than full precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant.affine import QParams, fake_quantize
from ..quant.layers import QuantizedLayer


def simulate(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """x of any float dtype -> output of the same dtype; the arithmetic is float32.

    Both operands are the exact values that integer kernels multiply: (q - zero_point) * scale.
    """
    qparams = None if layer.input_spec is None else layer.input_qparams()
    return simulate_with(layer, x, _float_weight(layer), layer.bias_now(), qparams)


def simulate_with(
    layer: QuantizedLayer, x: Tensor, weight: Tensor, bias: Tensor | None, qparams: QParams | None
) -> Tensor:
    """The layer on x with another weight, bias and input range; differentiable in all of them."""
    y = layer.smoothed(x.to(torch.float32))
    spec = layer.input_spec
    if spec is not None and qparams is not None:
        y = fake_quantize(y, qparams, spec)
    if layer.is_conv:
        y = F.conv2d(y, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        y = F.linear(y, weight, bias)
    return y.to(x.dtype)


def _float_weight(layer: QuantizedLayer) -> Tensor:
    """Dequantized once per layer and kept beside its codes, unless memory is dear."""
    if layer.low_memory:
        return layer.float_weight()
    weight = layer.__dict__.get("_simulated_weight")
    if weight is None or weight.device != layer.weight.device:
        weight = layer.float_weight()
        layer.__dict__["_simulated_weight"] = weight
    return weight
