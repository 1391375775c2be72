"""Rotation of channels in groups by a regular Hadamard matrix, which spreads outliers.

    y = x H, W' = W H, H = H^T = H^-1: y W'^T = x W^T

H is a Kronecker power of the regular 4 x 4 matrix J / 2 - F, with J all ones and F the reversal:
every row has the sum 1 (2 before the scaling), so that a common offset of a group's channels is
not gathered in one of them, as Sylvester's matrix does with its row of ones. A rotation is made of
sums and differences in a fixed order: the same bits in every batch, eager or compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROTATIONS = (4, 16, 64)
"""Channels of a group: powers of 4."""


def rotate(x: Tensor, group: int) -> Tensor:
    """x [..., C], C a multiple of group -> x with every `group` neighbouring channels times H."""
    digits = ROTATIONS.index(group) + 1
    y = x.reshape(*x.shape[:-1], x.shape[-1] // group, *[4] * digits)
    for axis in range(-digits, 0):
        a, b, c, d = y.unbind(axis)
        half = ((a + b) + (c + d)) * 0.5
        y = torch.stack([half - d, half - c, half - b, half - a], axis)
    return y.reshape(x.shape)


def rotation_matrix(group: int) -> Tensor:
    """H [group, group], float32."""
    return rotate(torch.eye(group), group)
