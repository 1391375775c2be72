"""Codes as they are stored: two 4-bit codes to a byte, low nibble first; wider codes one each."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [O, ...] integer -> [O, bytes]: uint8, or int8 for the signed codes of 8 bits.

    Up to 4 bits: along the flattened input dimension, code 2i in the low nibble of byte i and
    code 2i + 1 in the high one; an odd last code has a zero above it.
    """
    flat = codes.reshape(codes.shape[0], -1)
    if bits == 8:
        return flat.to(torch.int8)
    flat = flat.to(torch.uint8)
    if bits > 4:
        return flat
    if flat.shape[1] % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return flat[:, 0::2] | (flat[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of pack; shape: of the weight, [O, ...]. Returns int32 codes."""
    if bits > 4:
        return packed.reshape(shape).to(torch.int32)
    codes = torch.stack([packed & 0x0F, packed >> 4], dim=-1).reshape(shape[0], -1)
    in_features = 1
    for size in shape[1:]:
        in_features *= size
    return codes[:, :in_features].reshape(shape).to(torch.int32)
