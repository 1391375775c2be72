"""Codes as they are stored: every output channel's codes as one stream of bits, lowest bit first.

Code i of a channel takes the bits [i b, (i + 1) b) of its stream, bit k of the stream is bit k % 8
of byte k // 8, and the last byte is filled up with zeros. So 4-bit codes lie two to a byte, low
nibble first, 2-bit codes four to a byte, and eight 3-bit codes in three bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [O, ...] integer -> [O, ceil(I bits / 8)]: uint8, or int8 for the signed 8-bit codes.

    I: the flattened input dimension. bits: 2 to 8; below 8, codes are in [0, 2^bits - 1].
    """
    flat = codes.reshape(codes.shape[0], -1)
    if bits == 8:
        return flat.to(torch.int8)
    if 8 % bits == 0:
        return _join(flat.to(torch.uint8), bits, 8 // bits).squeeze(-1)
    words = _join(flat.to(torch.int64), bits, 8)  # eight codes: a word of `bits` bytes
    packed = _cut(words, 8, bits).to(torch.uint8)
    return packed[:, : math.ceil(flat.shape[1] * bits / 8)].contiguous()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of pack; shape: of the weight, [O, ...]. Returns int32 codes."""
    if bits == 8:
        return packed.reshape(shape).to(torch.int32)
    if 8 % bits == 0:
        codes = _cut(packed.unsqueeze(-1), bits, 8 // bits)
    else:
        codes = _cut(_join(packed.to(torch.int64), 8, bits), bits, 8)
    return codes[:, : math.prod(shape[1:])].reshape(shape).to(torch.int32)


def _join(parts: Tensor, width: int, count: int) -> Tensor:
    """Parts [O, N] of `width` bits -> words [O, ceil(N / count), 1] of `count` parts each."""
    short = -parts.shape[1] % count
    parts = F.pad(parts, (0, short)).reshape(parts.shape[0], -1, count)
    words = parts[..., 0]
    for i in range(1, count):
        words = words | (parts[..., i] << (width * i))
    return words.unsqueeze(-1)


def _cut(words: Tensor, width: int, count: int) -> Tensor:
    """Words [O, M, 1] -> their `count` lowest parts of `width` bits each, [O, M * count]."""
    mask = (1 << width) - 1
    parts = [(words >> (width * i)) & mask for i in range(count)]
    return torch.cat(parts, dim=-1).flatten(1)
