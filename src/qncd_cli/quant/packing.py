"""Codes as they are stored: every output channel's codes as one stream of bits, lowest bit first.

Code i of a channel takes the bits [i b, (i + 1) b) of its stream, bit k of the stream is bit k % 8
of byte k // 8, and the last byte is filled up with zeros. So 4-bit codes lie two to a byte, low
nibble first, 2-bit codes four to a byte, and eight 3-bit codes in three bytes. The signed codes of
8 and of 15 bits are stored as int8 and int16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..spec import WIDE_WEIGHT_BITS

NARROW = 64
"""Largest weight with which two products of codes of 8 bits fit int16: 2 * 255 * 64 < 2^15."""
NARROW_INPUT_BITS = 7
"""Bits of codes whose products with any weight of a byte do: 2 * 127 * 128 < 2^15."""
PART_BITS = 6
"""Bits of a weight's parts where larger ones are not taken; the last part has a sign."""
SIGNED = {8: torch.int8, WIDE_WEIGHT_BITS: torch.int16}


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [O, ...] integer -> [O, ceil(I bits / 8)] uint8, or [O, I] of a signed type.

    I: the flattened input dimension. bits: 2 to 8 or 15; below 8, codes are in [0, 2^bits - 1].
    """
    flat = codes.reshape(codes.shape[0], -1)
    if bits in SIGNED:
        return flat.to(SIGNED[bits])
    per_word, word_bytes, word_type = _words(bits)
    words = _join(flat.to(word_type), bits, per_word)
    packed = _cut(words, 8, word_bytes).to(torch.uint8)
    return packed[:, : math.ceil(flat.shape[1] * bits / 8)].contiguous()


def unpack(
    packed: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int32
) -> Tensor:
    """Inverse of pack; shape: of the weight, [O, ...]; dtype: of the codes, which fit it."""
    if bits in SIGNED:
        return packed.reshape(shape).to(dtype)
    per_word, word_bytes, word_type = _words(bits)
    codes = _cut(_join(packed.to(word_type), 8, word_bytes), bits, per_word)
    return codes[:, : math.prod(shape[1:])].reshape(shape).to(dtype)


def narrowed(x: Tensor) -> Tensor:
    """The same numbers in 16 bits where these hold all of them exactly, else x itself."""
    if x.dtype != torch.float32:
        return x
    halves = (x.to(kind) for kind in (torch.float16, torch.bfloat16))
    return next((half for half in halves if torch.equal(half.to(x.dtype), x)), x)


def _words(bits: int) -> tuple[int, int, torch.dtype]:
    """The shortest word of whole codes and whole bytes: its codes, its bytes, a type it fits."""
    length = math.lcm(bits, 8)
    word_type = torch.uint8 if length == 8 else torch.int32 if length < 32 else torch.int64
    return length // bits, length // 8, word_type


def _join(parts: Tensor, width: int, count: int) -> Tensor:
    """Parts [O, N] of `width` bits -> words [O, ceil(N / count), 1] of `count` parts each."""
    if count == 1:
        return parts.unsqueeze(-1)
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


def weight_bytes(weight: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """An integer weight [O, ...] with its scale [O] in bytes: int8 weights, each with a scale [O],
    whose sum is the weight. One of int8; of int16 (15 bits, w = 128 high + low) low and high."""
    if weight.dtype == torch.int8:
        return [(weight, scale)]
    return [((weight & 127).to(torch.int8), scale), ((weight >> 7).to(torch.int8), 128 * scale)]


def narrow_bytes(weight: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same where no byte may be beyond NARROW: parts of PART_BITS bits, as many as it takes."""
    parts, rest = [], weight.to(torch.int16)  # as int8, -128 has no absolute value
    while int(rest.abs().max()) > NARROW:
        parts.append(((rest & (2**PART_BITS - 1)).to(torch.int8), scale))
        rest, scale = rest >> PART_BITS, 2**PART_BITS * scale
    return [*parts, (rest.to(torch.int8), scale)]
