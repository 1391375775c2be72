"""Codes of what norms make of an input, beside those of torch's own norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qncd_cli.backends.cuda.norms import GroupNorm, LayerNorm, quantize_image, quantize_rows
from qncd_cli.backends.cuda.quantize import Quantizer
from qncd_cli.quant import affine
from qncd_cli.quant.affine import QParams
from qncd_cli.quant.smoothing import smooth
from qncd_cli.spec import activation_spec

from ..test_int8 import random
from .test_quantize import codes

MOST_OTHERS = 0.002
"""Share of the codes that the order of a sum may move, by one."""


def check(found: tuple[Tensor, Tensor], y: Tensor, quantizer: Quantizer) -> None:
    """The codes are those of y [..., C], but for few that are one off."""
    smoothed = y.float()
    if quantizer.factor is not None:
        smoothed = smooth(smoothed, quantizer.factor, -1, quantizer.shift)
    range_ = QParams(quantizer.scale, quantizer.zero_point)
    expected = affine.quantize(smoothed, range_, activation_spec(quantizer.bits))
    assert expected.float().std() > 10
    off = (codes(*found, quantizer.bits) - expected).abs()
    wide = 4 if y.dtype == torch.float32 else 2 ** (quantizer.bits - 8) + 1
    assert off.max() <= (1 if quantizer.bits <= 8 else wide)
    if quantizer.bits <= 8:
        assert (off > 0).float().mean() <= MOST_OTHERS


def quantizer_of(bits: int, channels: int, smoothed: bool) -> Quantizer:
    scale = torch.tensor(0.03 / 2.0 ** (bits - 8))
    zero_point = torch.tensor(100 * 2 ** (bits - 8), dtype=torch.int32)
    if not smoothed:
        return Quantizer(scale, zero_point, bits)
    return Quantizer(
        scale, zero_point, bits, random(channels, seed=1).abs() + 0.5, random(channels, seed=2)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("silu", "embedded", "smoothed"), [(True, True, False), (False, False, True)]
)
def test_group_norm(dtype, bits, silu, embedded, smoothed):
    """A mean far from zero; channels of a group that are no power of two; any order in memory."""
    x = (random(2, 30, 9, 8) * 2 + 5).to(dtype)
    weight, bias = random(30, seed=3).to(dtype), random(30, seed=4).to(dtype)
    embedding = random(2, 30, seed=5).to(dtype) if embedded else None
    quantizer = quantizer_of(bits, 30, smoothed)
    y = x if embedding is None else x + embedding[:, :, None, None]
    y = F.group_norm(y, 5, weight, bias, 1e-5)
    y = (F.silu(y) if silu else y).permute(0, 2, 3, 1)
    norm = GroupNorm(weight, bias, 5, 1e-5, silu, embedding)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        if image.shape != x.shape:
            image = image.contiguous().transpose(2, 3)
        found = quantize_image(image, norm, quantizer)
        assert found[0].is_contiguous()
        check(found, y, quantizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("affine_", "modulated", "smoothed"), [(True, False, False), (False, True, True)]
)
def test_layer_norm(dtype, bits, affine_, modulated, smoothed):
    x = (random(2, 7, 70) * 3 + 4).to(dtype)
    quantizer = quantizer_of(bits, 70, smoothed)
    weight, bias = (random(70, seed=s).to(dtype) if affine_ else None for s in (3, 4))
    multiplier, addend = (
        (random(2, 70, seed=s) + 1).to(dtype) if modulated else None for s in (5, 6)
    )
    y = F.layer_norm(x, (70,), weight, bias, 1e-6)
    if multiplier is not None and addend is not None:
        y = y * multiplier[:, None] + addend[:, None]
    norm = LayerNorm(1e-6, weight, bias, multiplier, addend)
    check(quantize_rows(x, norm, quantizer), y, quantizer)


def test_no_rows():
    quantizer = quantizer_of(8, 8, False)
    empty = random(0, 3, 8)
    assert quantize_rows(empty, LayerNorm(1e-6), quantizer)[0].shape == (0, 3, 8)
    norm = GroupNorm(torch.ones(8), torch.zeros(8), 2, 1e-6, False)
    found, _ = quantize_image(random(0, 8, 3, 2), norm, quantizer)
    assert found.shape == (0, 3, 2, 8)
