"""From a weight to integer codes: choice of scales, and the table of rounding methods."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import QSpec
from .affine import QParams, choose_qparams, dequantize, fake_quantize, quantize
from .gptq import gptq_codes

SEARCHED_AT_ONCE = 1 << 17
"""Weights, so that the passes over them stay within a core's cache."""
CLIP_FRACTIONS = 40
MIN_FRACTION = 0.5


class RoundedWeight(NamedTuple):
    """codes: int32 [O, ...]; qparams: per output channel; note: what fell back, or empty."""

    codes: Tensor
    qparams: QParams
    note: str = ""


def minmax_weight_qparams(weight: Tensor, spec: QSpec) -> QParams:
    """weight [O, ...] -> scale, zero_point [O] that cover every value of the channel."""
    flat = weight.reshape(weight.shape[0], -1)
    return choose_qparams(flat.amin(1), flat.amax(1), spec)


def mse_weight_qparams(weight: Tensor, spec: QSpec) -> QParams:
    """Per output channel, the clipped range with the least squared error of nearest rounding.

    Both ends shrink together through 40 fractions from 1 to 0.5.
    """
    flat = weight.reshape(weight.shape[0], -1).to(torch.float32)
    rows = max(1, SEARCHED_AT_ONCE // max(1, flat.shape[1]))
    found = [_least_squares(part, spec) for part in flat.split(rows)]
    return QParams(*(torch.cat(values) for values in zip(*found, strict=True)))


def _least_squares(flat: Tensor, spec: QSpec) -> QParams:
    """Range of least squared error for each row of [O, K] float32."""
    fractions = torch.linspace(1, MIN_FRACTION, CLIP_FRACTIONS)[:, None]
    lows, highs = (fractions * end for end in (flat.amin(1), flat.amax(1)))
    qparams = choose_qparams(lows, highs, spec)
    tried = [QParams(*pair) for pair in zip(*qparams, strict=True)]
    errors = [(fake_quantize(flat, one, spec) - flat).square().sum(1) for one in tried]
    best = torch.stack(errors).argmin(0, keepdim=True)
    return QParams(*(part.gather(0, best)[0] for part in qparams))


def weight_qparams(weight: Tensor, spec: QSpec) -> QParams:
    """Per output channel: clipped by squared error below 8 bits, min-max from there."""
    return (minmax_weight_qparams if spec.bits >= 8 else mse_weight_qparams)(weight, spec)


def round_nearest(weight: Tensor, spec: QSpec) -> RoundedWeight:
    """weight [O, ...] -> codes, each the nearest to its weight."""
    qparams = weight_qparams(weight, spec)
    return RoundedWeight(quantize(weight, qparams, spec), qparams)


def round_gptq(weight: Tensor, spec: QSpec, hessian: Tensor) -> tuple[RoundedWeight, Tensor]:
    """Frantar et al. 2022; nearest where its result is worse on the Hessian's own objective.

    Returns the codes, and the squared error of the output that they leave, [O].
    """
    nearest = round_nearest(weight, spec)
    flat = weight.reshape(weight.shape[0], -1).to(torch.float32)
    codes, note = gptq_codes(flat, hessian, nearest.qparams, spec)
    nearest_error = hessian_error(flat, nearest.codes.reshape(flat.shape), nearest.qparams, hessian)
    if codes is None:
        return nearest._replace(note=note), nearest_error
    error = hessian_error(flat, codes, nearest.qparams, hessian)
    keep = error <= nearest_error
    codes = torch.where(keep[:, None], codes, nearest.codes.reshape(flat.shape))
    rounded = RoundedWeight(codes.reshape(weight.shape), nearest.qparams, note)
    return rounded, torch.where(keep, error, nearest_error)


def hessian_error(weight: Tensor, codes: Tensor, qparams: QParams, hessian: Tensor) -> Tensor:
    """Per output channel, (w - w^) H (w - w^)^T: the squared error of the layer's output. [O]"""
    spec = QSpec(8, axis=0)  # dequantize reads the axis only
    difference = weight - dequantize(codes, qparams, spec)
    return ((difference @ hessian.to(difference)) * difference).sum(1)
