"""The arithmetic of quantization. Nothing else in qncd rounds or clamps codes.

Notation: x ~ (q - zero_point) * scale with q integer in [qmin, qmax] (Jacob et al. 2018, eq. 1).
Every function returns new tensors; what it is given is not changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import QSpec

ZERO_SCALE = 1e-8
"""Scale of a range that is constant zero, where any will do."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Below it float32 loses digits, and 1 / scale is infinite."""


class QParams(NamedTuple):
    """scale: float32, real units per code, > 0; zero_point: int32, in the quantized domain."""

    scale: Tensor
    zero_point: Tensor

    def at(self, group: int) -> QParams:
        """The range of one timestep group, out of one for each, [G] -> []."""
        return QParams(self.scale[group], self.zero_point[group])


def choose_qparams(x_min: Tensor, x_max: Tensor, spec: QSpec) -> QParams:
    """Affine parameters so that [x_min, x_max] maps onto [qmin, qmax].

    x_min, x_max: [C] or [] float, real units; widened to include 0 together, so that scale and
    zero_point come from one range and an all-positive channel keeps its top.
    Returns scale float32 and zero_point int32 of the same shape; symmetric: zero_point is 0.
    Source: Jacob et al. 2018, sec. 3. Raises ValueError if x_min > x_max or not finite.
    """
    if not (torch.isfinite(x_min).all() and torch.isfinite(x_max).all()):
        raise ValueError("range is not finite")
    if (x_min > x_max).any():
        raise ValueError("x_min exceeds x_max")
    low = x_min.to(torch.float32).clamp(max=0)
    high = x_max.to(torch.float32).clamp(min=0)
    if spec.symmetric:
        scale = _positive_scale(torch.maximum(-low, high) / spec.qmax)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
    scale = _positive_scale((high - low) / (spec.qmax - spec.qmin))
    zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return QParams(scale, zero_point.to(torch.int32))


def _positive_scale(scale: Tensor) -> Tensor:
    """The scale, with no floor but the type's: tiny weights may stand before a large gain."""
    return torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), ZERO_SCALE)


def _aligned(parameter: Tensor, x: Tensor, spec: QSpec) -> Tensor:
    """A per-channel parameter [C] shaped to broadcast along spec.axis of x."""
    if spec.axis is None:
        return parameter
    shape = [1] * x.ndim
    shape[spec.axis] = -1
    return parameter.reshape(shape)


def round_straight_through(x: Tensor) -> Tensor:
    """torch.round, whose gradient is taken as 1 (Bengio et al. 2013, arXiv 1308.3432).

    x + (round(x) - x) is round(x) exactly: both operations are exact in floating point.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return x + (torch.round(x) - x).detach()
    return torch.round(x)


def round_to_codes(x: Tensor, qparams: QParams, spec: QSpec) -> Tensor:
    """The codes of quantize, kept in a float tensor (exact integers).

    Differentiable: in x by the straight-through estimator, which gives the scale the gradient
    of LSQ (Esser et al. 2020, arXiv 1902.08153, eq. 3).
    """
    scale = _aligned(qparams.scale, x, spec)
    zero_point = _aligned(qparams.zero_point, x, spec)
    return (round_straight_through(x / scale) + zero_point).clamp(spec.qmin, spec.qmax)


def quantize(x: Tensor, qparams: QParams, spec: QSpec) -> Tensor:
    """x: any shape, float -> codes of the same shape, int32, in [qmin, qmax]."""
    return round_to_codes(x, qparams, spec).to(torch.int32)


def dequantize(codes: Tensor, qparams: QParams, spec: QSpec) -> Tensor:
    """Codes of any integer type -> float32 real values (q - zero_point) * scale."""
    zero_point = _aligned(qparams.zero_point, codes, spec)
    scale = _aligned(qparams.scale, codes, spec)
    return (codes.to(torch.float32) - zero_point) * scale


def fake_quantize(x: Tensor, qparams: QParams, spec: QSpec) -> Tensor:
    """dequantize(quantize(x)) in float: what an integer kernel sees of x."""
    scale = _aligned(qparams.scale, x, spec)
    zero_point = _aligned(qparams.zero_point, x, spec)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return (round_to_codes(x, qparams, spec) - zero_point) * scale
    y = torch.div(x, scale).round_()  # the same numbers in one copy of x
    known = zero_point.ndim == 0 and zero_point.device.type == "cpu"
    if known and not torch.compiler.is_compiling():
        ends = spec.qmin - int(zero_point), spec.qmax - int(zero_point)
        return y.clamp_(*ends).mul_(scale)
    return y.add_(zero_point).clamp_(spec.qmin, spec.qmax).sub_(zero_point).mul_(scale)


def round_between(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, out: Tensor) -> Tensor:
    """The codes of quantize less their zero-points, float, into `out`: many small calls in a row.

    x, scale, low, high, out: [C] float32; low, high: qmin and qmax less the zero-point.
    """
    return torch.div(x, scale, out=out).round_().clamp_(low, high)


ROUND_TO_EVEN = 1.5 * 2.0**23
"""y + this has no room for a fraction: y is rounded, half to even, and |y| < 2^22 lies in the low
bits of the float32 sum."""
ITS_BITS = 0x4B400000
"""Bits of ROUND_TO_EVEN in float32, read as an integer."""


def quantize_uint8(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """The codes of quantize, uint8, in fewer passes over memory: one scale, at most 8 bits.

    x: float32 of any shape and order; the codes keep both. NaN becomes zero_point.
    """
    low_byte = _rounded(x, scale, zero_point, bits).to(torch.uint8)
    return low_byte.add_(zero_point)


def quantize_two_bytes(
    x: Tensor, scale: float, zero_point: int, bits: int
) -> tuple[Tensor, Tensor]:
    """The same for at most 16 bits: low bytes and high bytes, uint8."""
    codes = _rounded(x, scale, zero_point, bits).add_(zero_point - ITS_BITS)
    return codes.to(torch.uint8), codes.bitwise_right_shift_(8).to(torch.uint8)


def _rounded(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """ITS_BITS and the code less its zero-point, int32.

    The bounds are integers, so clamping before rounding gives what clamping after it gives.
    """
    y = torch.div(x, scale).clamp_(-zero_point, 2**bits - 1 - zero_point)
    return y.add_(ROUND_TO_EVEN).view(torch.int32)
