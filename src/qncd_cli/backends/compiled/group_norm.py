"""Group normalization as the compiler sees it: the same numbers, in an order that it vectorizes."""

from __future__ import annotations

from torch import Tensor


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalization (Wu & He, arXiv 1803.08494, eq. 1 to 6) of x [N, C, ...].

    As sums per channel: with the few channels of a group the compiler fills its vectors only in
    part. Sums are relative to each channel's first value, so that a mean far from zero costs no
    digits.
    """
    grouped = (groups, x.shape[1] // groups)
    y = x.float().flatten(2)
    first = y[:, :, :1]
    offset = y - first
    mean_offset = offset.mean(2)
    within = (offset * offset).mean(2) - mean_offset * mean_offset
    means = (first.squeeze(2) + mean_offset).unflatten(1, grouped)
    mean = means.mean(2, keepdim=True)
    between = (means - mean).square()
    variance = (within.unflatten(1, grouped) + between).mean(2, keepdim=True)
    factor = (variance + eps).rsqrt() * weight.float().unflatten(0, grouped)
    shift = bias.float().unflatten(0, grouped) - mean * factor
    ones = [1] * (x.ndim - 2)
    factor, shift = (
        _in_memory(part.flatten(1)).unflatten(1, (-1, *ones)) for part in (factor, shift)
    )
    return (x.float() * factor + shift).to(x.dtype)


def _in_memory(x: Tensor) -> Tensor:
    """x [N, C]; the compiler would else compute it again for every position of an image."""
    from torch._inductor import inductor_prims  # large

    return inductor_prims.force_stride_order(x, (x.shape[1], 1))
