"""Quantized layers as operators of ONNX, in the two forms that runtimes turn into integer kernels.

Both compute S s sum_c (q_c - z) w_c + bias, what the simulate backend computes. q: codes of the
input with scale s and zero-point z, which change with the timestep group; w: int8 weights with a
scale S per output channel. Inputs and weights of more than 8 bits are two bytes, each with a
product of its own, as in the int8 backend.

INTEGER, for ONNX Runtime: QuantizeLinear, then ConvInteger or MatMulInteger with z, and their sums
scaled. (It computes a Conv between DequantizeLinear and a float output in floating point.)
Attention: MatMulInteger likewise, of two inputs.

FAKE, for OpenVINO: QuantizeLinear and DequantizeLinear around q itself (scale 1, zero-point 0, as
OpenVINO fuses constants only; a scale that never changes is one, and would be folded into the
weights if it came later), DequantizeLinear on w, Conv or MatMul, and then what z adds is taken off:
sum_c (q_c - z) w_c = sum_c q_c w_c - z sum_c w_c. Borders are filled before quantization, with
zeros, whose code is z. Attention: fake quantization, products in floating point.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...quant.affine import QParams
from ...quant.attention import AttentionProducts
from ...quant.layers import QuantizedLayer
from ...quant.packing import NARROW_INPUT_BITS, narrow_bytes, weight_bytes
from ...spec import FLOAT_BITS
from .. import int8

BYTE = 256


class Form(enum.Enum):
    INTEGER = "integer"
    FAKE = "fake"


class Writer:
    """Operators of one layer or attention module; group: the index of its timestep group;
    any_cpu: whether they are exact without VNNI as well."""

    def __init__(self, form: Form, name: str, group: ir.Value, any_cpu: bool):
        self.form, self.name, self.group, self.any_cpu = form, name, group, any_cpu
        self.tape = ir.tape.Tape()

    # ------------------------------------------------------------------ both forms

    def layer(self, layer: QuantizedLayer, x: ir.Value) -> ir.Value:
        """Output of a layer for which int8.why_not has no reason."""
        y = self._smoothed(layer, x)
        weights = weights_of(layer, self.any_cpu)
        write = self._integer if self.form is Form.INTEGER else self._fake
        outputs, bias = write(layer, y, weights)
        y = outputs[0]
        for more in outputs[1:]:
            y = self._op("Add", y, more)
        if bias is None:
            return y
        shape = [*bias.shape, 1, 1] if layer.is_conv else bias.shape
        return self._op("Add", y, self._row("bias", bias.reshape(shape)))

    def _smoothed(self, layer: QuantizedLayer, x: ir.Value) -> ir.Value:
        sides = [1, 1] if layer.is_conv else []
        if layer.rotation:
            x = self._rotated(x, layer.rotation)
        for name, operator in (("shift", "Sub"), ("smoothing", "Div")):
            value = layer.get_buffer(name)
            if value is not None:
                x = self._op(operator, x, self._constant(name, value.reshape(-1, *sides)))
        return x

    def _rotated(self, x: ir.Value, group: int) -> ir.Value:
        """x H of quant.rotation: along each digit of base 4, half the sum less the reverse."""
        shape, width = self._op("Shape", x), group
        axis, half = torch.tensor([1]), torch.tensor(0.5)
        reverse = self._constant("reverse", torch.tensor([3, 2, 1, 0]))
        while width > 1:
            width //= 4
            digit = self._constant(f"digit_{width}", torch.tensor([-1, 4, width]))
            y = self._op("Reshape", x, digit)
            total = self._op("ReduceSum", y, self._constant("axis", axis), keepdims=1)
            total = self._op("Mul", total, self._constant("half", half))
            x = self._op("Sub", total, self._op("Gather", y, reverse, axis=1))
        return self._op("Reshape", x, shape)

    def _bytes(self, codes: ir.Value, zero_point: Tensor, bits: int) -> list[Any]:
        """Codes, integers in float, byte by byte; zero-points [G] and what each byte counts."""
        if bits <= 8:
            return [(codes, zero_point, 1)]
        byte = self._constant("byte", torch.tensor(float(BYTE)))
        high = self._op("Floor", self._op("Div", codes, byte))
        low = self._op("Sub", codes, self._op("Mul", high, byte))
        return [(low, zero_point & (BYTE - 1), 1), (high, zero_point >> 8, BYTE)]

    # ------------------------------------------------------------------ for ONNX Runtime

    def _integer(
        self, layer: QuantizedLayer, y: ir.Value, weights: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[ir.Value], Tensor | None]:
        """Scaled products, and the bias [G, O] or [1, O] that is still missing."""
        bits, scale, zero_point = layer.activation_bits, layer.input_scale, layer.input_zero_point
        inputs: list[Any]
        if bits <= 8:
            inputs = [(self._codes("input", y, scale, zero_point, bits), zero_point, 1)]
        else:
            wide = self._codes("input", y, scale, zero_point, bits)
            parts = self._bytes(self._cast(wide, ir.DataType.FLOAT), zero_point, bits)
            inputs = [(self._cast(q, ir.DataType.UINT8), z, n) for q, z, n in parts]
        outputs = []
        for codes, offset, count in inputs:
            z = self._row(f"zero_point_{count}", offset.to(torch.uint8))
            for part, (weight, weight_scale) in enumerate(weights):
                scales = self._row(f"scale_{count}_{part}", count * scale[:, None] * weight_scale)
                outputs.append(self._sums(layer, codes, z, weight, f"weight_{part}", scales))
        return outputs, _bias(layer)

    def _sums(
        self,
        layer: QuantizedLayer,
        codes: ir.Value,
        zero_point: ir.Value,
        weight: Tensor,
        name: str,
        scales: ir.Value,
    ) -> ir.Value:
        if layer.is_conv:
            operands = (codes, self._constant(name, weight), zero_point)
            sums = self._op("ConvInteger", *operands, **_geometry(layer, padded=False))
            return self._op("DequantizeLinear", sums, scales, axis=1)
        operands = (codes, self._constant(name, weight.t().contiguous()), zero_point)
        sums = self._op("MatMulInteger", *operands)
        return self._op("Mul", self._cast(sums, ir.DataType.FLOAT), scales)

    def _codes(
        self, name: str, x: ir.Value, scale: Tensor, zero_point: Tensor, bits: int
    ) -> ir.Value:
        """QuantizeLinear: uint8, or uint16 above 8 bits; scale, zero_point [G]."""
        dtype = torch.uint8 if bits <= 8 else torch.uint16
        qparams = self._row(f"{name}_scale", scale), self._row(f"{name}_code", zero_point.to(dtype))
        codes = self._op("QuantizeLinear", x, *qparams)
        if bits in (8, 16):
            return codes  # it saturates there itself
        largest = self._constant(f"{name}_largest", torch.tensor(2.0**bits - 1))
        kept = self._op("Min", self._cast(codes, ir.DataType.FLOAT), largest)
        return self._cast(kept, ir.DataType.UINT8 if bits <= 8 else ir.DataType.UINT16)

    # ------------------------------------------------------------------ for OpenVINO

    def _fake(
        self, layer: QuantizedLayer, y: ir.Value, weights: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[ir.Value], Tensor | None]:
        """Scaled products for OpenVINO, in the form that _integer returns."""
        bits, scale, zero_point = layer.activation_bits, layer.input_scale, layer.input_zero_point
        if layer.is_conv and any(int8.geometry(layer)[1]):
            top, left = int8.geometry(layer)[1]
            sides = torch.tensor([0, 0, top, left, 0, 0, top, left])
            y = self._op("Pad", y, self._constant("pads", sides))
        codes = self._rounded("input", y, scale, zero_point, bits)
        fixed = _same(scale)
        inputs = []
        for q, _, count in self._bytes(codes, zero_point, bits):
            unit = count * scale[0] if fixed else torch.tensor(1.0)
            inputs.append((self._as_bytes(q, unit, count), count))
        outputs = []
        for part, (weight, weight_scale) in enumerate(weights):
            stored = self._constant(f"weight_{part}", weight)
            stored_scale = self._constant(f"weight_scale_{part}", weight_scale)
            for q, count in inputs:  # each with a DequantizeLinear of its own, or it is not fused
                w = self._op("DequantizeLinear", stored, stored_scale, axis=0)
                if layer.is_conv:
                    sums = self._op("Conv", q, w, **_geometry(layer, padded=True))
                else:
                    sums = self._op("MatMul", q, self._op("Transpose", w, perm=[1, 0]))
                if not fixed:
                    sums = self._op("Mul", sums, self._row(f"scale_{count}", count * scale))
                outputs.append(sums)
        totals = layer.float_weight().flatten(1).sum(1, dtype=torch.float64)
        offset = (scale * zero_point)[:, None] * totals.to(torch.float32)
        bias = _bias(layer)
        return outputs, -offset if bias is None else bias - offset

    def _rounded(
        self, name: str, x: ir.Value, scale: Tensor, zero_point: Tensor, bits: int
    ) -> ir.Value:
        """Codes as integers in float."""
        steps = self._op("Round", self._op("Div", x, self._row(f"{name}_scale", scale)))
        codes = self._op("Add", steps, self._row(f"{name}_code", zero_point.to(torch.float32)))
        ends = torch.tensor(0.0), torch.tensor(2.0**bits - 1)
        low, high = (self._constant(f"{name}_end_{i}", end) for i, end in enumerate(ends))
        return self._op("Clip", codes, low, high)

    def _as_bytes(self, codes: ir.Value, unit: Tensor, count: int) -> ir.Value:
        """codes * unit, which are bytes times unit; count: tells the bytes of a layer apart."""
        one = self._constant("one", torch.tensor(1.0))
        zero = self._constant("zero", torch.tensor(0, dtype=torch.uint8))
        scale = self._constant(f"unit_{count}", unit)
        q = self._op("QuantizeLinear", codes, one, zero)
        return self._op("DequantizeLinear", q, scale, zero)

    # ------------------------------------------------------------------ attention

    def attention(
        self,
        module: AttentionProducts,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        mask: ir.Value | None,
    ) -> ir.Value:
        """AttentionProducts.products; mask: added to the scores."""
        key = self._op("Transpose", key, perm=[0, 1, 3, 2])
        bits, p_bits = module.bits, module.probabilities_bits
        ranges = {name: _range(module, name) for name in ("query", "key", "value")}
        ranges["probabilities"] = _range(module, "probabilities")
        scores = self._product(("query", query, bits), ("key", key, bits), ranges)
        scores = self._op("Mul", scores, self._constant("scale", torch.tensor(module.scale)))
        if mask is not None:
            scores = self._op("Add", scores, mask)
        p = self._op("Softmax", scores, axis=-1)
        return self._product(("probabilities", p, p_bits), ("value", value, bits), ranges)

    def _product(
        self,
        a: tuple[str, ir.Value, int],
        b: tuple[str, ir.Value, int],
        ranges: dict[str, QParams | None],
    ) -> ir.Value:
        """Product of two operands (name, value, bits), in integers where the form has them."""
        named = [(name, x, bits, ranges[name]) for name, x, bits in (a, b)]
        if self.form is Form.FAKE or not integer_product(a[2], b[2]):
            return self._op("MatMul", *(self._requantized(*operand) for operand in named))
        codes, zero_points, scale = [], [], torch.ones(1)
        for name, x, bits, qparams in named:
            assert qparams is not None
            codes.append(self._codes(name, x, *qparams, bits))
            zero_points.append(self._row(f"{name}_code", qparams.zero_point.to(torch.uint8)))
            scale = scale * qparams.scale
        sums = self._op("MatMulInteger", *codes, *zero_points)
        return self._op(
            "Mul", self._cast(sums, ir.DataType.FLOAT), self._row(f"{a[0]}_unit", scale)
        )

    def _requantized(self, name: str, x: ir.Value, bits: int, qparams: QParams | None) -> ir.Value:
        """Fake quantization in float."""
        if qparams is None:
            return x
        codes = self._rounded(name, x, *qparams, bits)
        offset = self._row(f"{name}_offset", qparams.zero_point.to(torch.float32))
        factor = self._row(f"{name}_factor", qparams.scale)
        return self._op("Mul", self._op("Sub", codes, offset), factor)

    # ------------------------------------------------------------------ words

    def _op(self, operator: str, *operands: ir.Value | None, **attributes: Any) -> ir.Value:
        number = len(self.tape.nodes)
        return self.tape.op(operator, operands, attributes, name=f"{self.name}/{number}_{operator}")

    def _cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self._op("Cast", x, to=int(dtype))

    def _constant(self, name: str, value: Tensor) -> ir.Value:
        full = f"{self.name}.{name}"
        for known in self.tape.initializers:
            if known.name == full:
                return known
        array = np.ascontiguousarray(value.detach().numpy())
        return self.tape.initializer(ir.tensor(array, name=full))

    def _row(self, name: str, table: Tensor) -> ir.Value:
        """The row of a table [G, ...] that holds at the timestep group."""
        if _same(table):
            return self._constant(name, table[0])
        return self._op("Gather", self._constant(name, table), self.group, axis=0)


def weights_of(layer: QuantizedLayer, any_cpu: bool) -> list[tuple[Tensor, Tensor]]:
    """The int8 weights, with scales [O], that a layer's input is multiplied with.

    any_cpu: none is larger than 64, if inputs have more than 7 bits. Without VNNI, ONNX Runtime and
    OpenVINO add two products in 16 bits, which saturates with larger ones.
    """
    narrow = any_cpu and layer.activation_bits > NARROW_INPUT_BITS
    take = narrow_bytes if narrow else weight_bytes
    return take(layer.integer_weight(), layer.weight_scale)


def integer_product(a_bits: int, b_bits: int) -> bool:
    """Whether the form INTEGER multiplies attention operands of these widths in integers."""
    return max(a_bits, b_bits) <= 8


def _range(module: AttentionProducts, operand: str) -> QParams | None:
    """scale and zero_point [G] or [1]; None where the operand stays in floating point."""
    if operand == "probabilities":
        if module.probabilities_bits == FLOAT_BITS:
            return None
        scale, zero_point = module.probabilities
        return QParams(scale.reshape(1), zero_point.reshape(1))
    if module.bits == FLOAT_BITS:
        return None
    parts = (module.get_buffer(f"{operand}_{part}") for part in ("scale", "zero_point"))
    return QParams(*parts)


def _same(table: Tensor) -> bool:
    """Whether all rows are equal."""
    return bool((table[:1] == table).all())


def _bias(layer: QuantizedLayer) -> Tensor | None:
    """[G, O], or [1, O] where it is the same in all timestep groups."""
    correction, bias = layer.bias_correction, layer.bias
    if correction is None:
        return None if bias is None else bias[None]
    return correction if bias is None else bias + correction


def _geometry(layer: QuantizedLayer, *, padded: bool) -> dict[str, Any]:
    """A convolution's attributes; padded: its input has its borders already."""
    stride, padding, dilation, groups = int8.geometry(layer)
    pads = [0, 0] if padded else padding
    return {"strides": stride, "pads": pads * 2, "dilations": dilation, "group": groups}
