"""AdaRound: whether a weight is rounded up or down is learnt (Nagel et al., arXiv 2004.10568).

| here | paper |
|---|---|
| logits | V |
| up_share(), in [0, 1] | h(V), the rectified sigmoid, eq. 23 |
| STRETCH_HIGH, STRETCH_LOW | zeta, gamma |
| undecided(h) | f_reg, eq. 24 |

The soft weight is ((base + h(V)) - zero_point) * scale, eq. 22. The paper's base is
floor(w / scale); here base and base + 1 are the code to start from and its neighbour towards w, so
that a start from GPTQ, which may be more than one code off, can be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..spec import QSpec
from .affine import QParams, dequantize

STRETCH_HIGH = 1.1
STRETCH_LOW = -0.1
BETA = 2.0
"""Exponent of the regulariser. The paper anneals it over tens of thousands of steps; from GPTQ's
codes and in hundreds of steps a constant 2 came out better. The regulariser is then 4h(1 - h)."""
START_SHARE = 0.9
"""h of a weight that starts at its upper code, 1 - START_SHARE at its lower one. Starting from
h = the fraction (the paper) gives up what GPTQ found: the soft weight is then w itself."""


class SoftRounding(nn.Module):
    """The rounding of one weight as something to be learnt.

    weight: [O, ...] float, smoothing folded in; codes: of the same shape, integer, where to
    start; qparams: scale and zero_point [O]; spec: of the weight. Every reachable code lies in
    [qmin, qmax]. Raises ValueError if the start does not.
    """

    base: Tensor

    def __init__(self, weight: Tensor, codes: Tensor, qparams: QParams, spec: QSpec):
        super().__init__()
        if codes.min() < spec.qmin or codes.max() > spec.qmax:
            raise ValueError(f"codes outside [{spec.qmin}, {spec.qmax}]")
        self.spec = spec
        self.qparams = qparams
        shape = [-1, *[1] * (weight.ndim - 1)]
        exact = weight.float() / qparams.scale.reshape(shape) + qparams.zero_point.reshape(shape)
        below = (exact < codes).to(torch.int32)
        base = (codes.to(torch.int32) - below).clamp(spec.qmin, spec.qmax - 1)
        share = torch.where(codes > base, START_SHARE, 1 - START_SHARE).to(weight.device)
        self.register_buffer("base", base)
        self.logits = nn.Parameter(
            torch.logit((share - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).contiguous()
        )

    def up_share(self) -> Tensor:
        """h(V) in [0, 1]: 0 is the lower code, 1 the upper one. The shape of the weight."""
        stretched = torch.sigmoid(self.logits) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
        return stretched.clamp(0, 1)

    def soft_weight(self, up_share: Tensor) -> Tensor:
        """The weight at h = up_share, float32, differentiable."""
        return dequantize(self.base + up_share, self.qparams, self.spec)

    def decided(self) -> Tensor:
        """h as it would be if every weight decided now: 0.0 or 1.0."""
        return (self.logits.detach() >= 0).to(torch.float32)

    def codes(self) -> Tensor:
        """The codes decided on, int32: the upper one where h >= 0.5, which is V >= 0."""
        return self.base + self.decided().to(torch.int32)


def undecided(up_share: Tensor) -> Tensor:
    """Sum of 1 - |2h - 1|^BETA: 0 where every weight has decided. []"""
    return (1 - (2 * up_share - 1).abs().pow(BETA)).sum()
