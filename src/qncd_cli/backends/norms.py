"""Group normalization as compiled graphs compute it: the same numbers, in an order that the
compiler vectorizes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch._inductor import inductor_prims


@contextmanager
def open_norms(module: nn.Module) -> Iterator[None]:
    """In this block group norms are sums per channel, which the compiler vectorizes; with the few
    channels of a group it fills its vectors only in part."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.GroupNorm) and norm.affine]
    try:
        for norm in norms:
            norm.forward = functools.partial(group_norm, norm)  # type: ignore[method-assign]
        yield
    finally:
        for norm in norms:
            del norm.forward


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group normalization (Wu & He, arXiv 1803.08494, eq. 1 to 6) of x [N, C, ...].

    Sums are relative to each channel's first value, so that a mean far from zero costs no digits.
    """
    grouped = (norm.num_groups, x.shape[1] // norm.num_groups)
    y = x.float().flatten(2)
    first = y[:, :, :1]
    offset = y - first
    mean_offset = offset.mean(2)
    within = (offset * offset).mean(2) - mean_offset * mean_offset
    means = (first.squeeze(2) + mean_offset).unflatten(1, grouped)
    mean = means.mean(2, keepdim=True)
    between = (means - mean).square()
    variance = (within.unflatten(1, grouped) + between).mean(2, keepdim=True)
    factor = (variance + norm.eps).rsqrt() * norm.weight.float().unflatten(0, grouped)
    shift = norm.bias.float().unflatten(0, grouped) - mean * factor
    ones = [1] * (x.ndim - 2)
    factor, shift = (
        _in_memory(part.flatten(1)).unflatten(1, (-1, *ones)) for part in (factor, shift)
    )
    return (x.float() * factor + shift).to(x.dtype)


def _in_memory(x: Tensor) -> Tensor:
    """x [N, C]; the compiler would else compute it again for every position of an image."""
    return inductor_prims.force_stride_order(x, (x.shape[1], 1))
