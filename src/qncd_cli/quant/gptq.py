"""GPTQ: second-order rounding of a weight matrix (Frantar et al. 2022, arXiv 2210.17323).

| here | paper |
|---|---|
| hessian [I, I] = 2 X X^T / n over n input vectors | H |
| inverse_factor, upper triangular, inverse_factor^T inverse_factor = H^-1 | Cholesky(H^-1)^T |
| dampening | lambda, 1% of the mean diagonal |

With a drift, the target is the output of full precision where the inputs have moved away from it
(GPTAQ, Li et al. 2025, arXiv 2504.02692), see `asymmetric_target`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..spec import QSpec
from .affine import QParams, dequantize, quantize

DAMPENING = 0.01
BLOCK = 128
GRAM_BLOCK = 256
"""Rows of a Hessian that are added to at once, from their diagonal on: half of it is the other
half's mirror image. A larger value computes more of it twice, a smaller one in narrower products.
"""
MAX_DAMPENING_TRIES = 4


class Curvature(NamedTuple):
    """What rounding knows of a layer's inputs X [n, I].

    hessian: 2 X^T X / n, [I, I]; drift: 2 (X_full - X)^T X / n, [I, I], with the inputs of full
    precision, or None where nobody looked at these.
    """

    hessian: Tensor
    drift: Tensor | None = None


class HessianAccumulator:
    """H = 2 X X^T / n of a layer's input vectors, as they stand before the weight.

    Convolutions are unfolded: an input vector is one receptive field, C * kh * kw long, in the
    order of the flattened weight. Accumulators of one layer merge by their sums.
    total: [I, I], of which the blocks below the diagonal are not filled.
    """

    def __init__(self, in_features: int):
        self.total = torch.zeros(in_features, in_features)
        self.moved: Tensor | None = None
        self.count = 0

    def update(
        self,
        x: Tensor,
        layer: nn.Conv2d | nn.Linear,
        max_rows: int | None = None,
        full: Tensor | None = None,
    ) -> None:
        """x: input of the layer, smoothed and quantized as at run time.

        max_rows: use at most so many input vectors, evenly strided. full: the smoothed input of
        full precision, for the drift; in all updates or in none.
        """
        rows = input_vectors(x, layer, max_rows)
        self.total = self.total.to(rows.device)
        for number, part in enumerate(self._filled()):  # the upper half; `hessian` mirrors it
            start = number * GRAM_BLOCK
            part.addmm_(rows[:, start : start + GRAM_BLOCK].T, rows[:, start:])
        self.count += len(rows)
        if full is not None:
            moved = torch.zeros_like(self.total) if self.moved is None else self.moved
            self.moved = moved.to(rows.device).addmm_(
                (input_vectors(full, layer, max_rows) - rows).T, rows
            )

    def merge(self, other: HessianAccumulator) -> None:
        self.total += other.total
        self.count += other.count
        if other.moved is not None:
            self.moved = other.moved if self.moved is None else self.moved + other.moved

    def hessian(self) -> Tensor:
        """[I, I] float32 on the CPU."""
        found = self.total.cpu() * (2 / max(1, self.count))
        for stop in range(GRAM_BLOCK, len(found), GRAM_BLOCK):
            found[stop:, stop - GRAM_BLOCK : stop] = found[stop - GRAM_BLOCK : stop, stop:].T
        return found

    def memory(self) -> dict[str, Tensor]:
        """Everything that was added up, for another accumulator of the layer to go on from; of the
        total the filled blocks, row by row."""
        blocks = [part.flatten() for part in self._filled()]
        kept = {"total": torch.cat(blocks).cpu(), "count": torch.tensor(self.count)}
        return kept if self.moved is None else kept | {"moved": self.moved.cpu()}

    def restore(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what another accumulator of the layer has added up."""
        sizes = [part.numel() for part in self._filled()]
        for part, values in zip(self._filled(), memory["total"].split(sizes), strict=True):
            part.copy_(values.reshape(part.shape))
        self.count = int(memory["count"])
        self.moved = memory["moved"].clone() if "moved" in memory else None

    def _filled(self) -> list[Tensor]:
        """Views of the blocks of the total that `update` adds to."""
        starts = range(0, len(self.total), GRAM_BLOCK)
        return [self.total[start : start + GRAM_BLOCK, start:] for start in starts]

    def curvature(self) -> Curvature:
        """The Hessian, and the drift where `update` was given full precision."""
        moved = None if self.moved is None else self.moved.cpu() * (2 / max(1, self.count))
        return Curvature(self.hessian(), moved)


def kept_bytes(in_features: int, *, drift: bool) -> int:
    """Bytes of the memory of a layer's accumulator, its count left out."""
    stops = range(in_features, 0, -GRAM_BLOCK)
    filled = sum(min(GRAM_BLOCK, stop) * stop for stop in stops)
    return 4 * (filled + in_features**2 * drift)


def input_vectors(x: Tensor, layer: nn.Conv2d | nn.Linear, max_rows: int | None = None) -> Tensor:
    """[N, C, H, W] or [..., I] -> [rows, I], I in the order of weight.reshape(O, -1).

    max_rows: take at most so many, evenly strided over samples and positions; only these are
    copied. Raises ValueError for grouped or dilated convolutions and padding given by name.
    """
    x = x.to(torch.float32)
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: _stride(len(rows), max_rows)]
    if layer.groups != 1 or layer.dilation != (1, 1) or isinstance(layer.padding, str):
        raise ValueError("no input vectors for grouped, dilated or name-padded convolutions")
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    fields = F.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)  # a view
    samples, _, height, width = fields.shape[:4]
    count = samples * height * width
    index = torch.arange(0, count, _stride(count, max_rows), device=x.device)
    n, h, w = index // (height * width), index // width % height, index % width
    return fields[n, :, h, w].reshape(len(index), -1)


def _stride(count: int, most: int | None) -> int:
    return 1 if most is None else max(1, -(-count // most))


def _scale_of(diagonal: Tensor) -> Tensor:
    """Mean of a Hessian's diagonal, to which dampening is relative; 1 where it is zero."""
    mean = diagonal.mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def inverse_factor(hessian: Tensor) -> tuple[Tensor | None, float]:
    """Upper triangular U with U^T U = (H + lambda I)^-1, and lambda / mean(diag H).

    Dampening starts at 1% and is raised tenfold until the Cholesky factorisation exists;
    (None, lambda) when it never does.
    """
    mean = _scale_of(hessian.diagonal())
    dampening = DAMPENING
    eye = torch.eye(len(hessian), dtype=hessian.dtype)
    for _ in range(MAX_DAMPENING_TRIES):
        lower, bad = torch.linalg.cholesky_ex(hessian + dampening * mean * eye)
        if not bad:
            factor, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bad:
                return factor, dampening
        dampening *= 10
    return None, dampening


def conditional_variances(hessian: Tensor) -> Tensor:
    """Variance of each input given those that GPTQ rounds after it, [I] float64.

    hessian: [I, I], any scale; order and dampening as in gptq_codes. The squared error that
    rounding leaves is their sum, each times the squared rounding error of its column.
    """
    diagonal = hessian.diagonal().clone()
    order = torch.argsort(diagonal, descending=True, stable=True).flip(0)
    damped = hessian[order][:, order]
    damped.diagonal().add_(DAMPENING * _scale_of(diagonal))
    lower, bad = torch.linalg.cholesky_ex(damped)
    result = torch.empty(len(hessian), dtype=torch.float64)
    found = diagonal if bad else lower.diagonal().square()
    result[order] = (diagonal[order] if bad else found).double()
    return result


def gptq_codes(
    weight: Tensor, hessian: Tensor, qparams: QParams, spec: QSpec
) -> tuple[Tensor | None, str]:
    """Round weight [O, I] column by column, pushing each column's error onto the later ones.

    hessian: [I, I]; qparams: per output channel, fixed beforehand. Columns go in the order of
    falling diagonal ("activation order"); inputs that are always zero keep nearest rounding.
    Returns codes int32 [O, I] and a note (empty, or what had to be done); codes None when the
    Hessian could not be factored.
    """
    hessian = hessian.clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor, dampening = inverse_factor(hessian[order][:, order])
    if factor is None:
        return None, "Hessian not positive definite: nearest rounding"
    note = "" if dampening == DAMPENING else f"dampening {dampening:g}"
    work = weight[:, order].clone()
    codes = torch.empty_like(work, dtype=torch.int32)
    size = work.shape[1]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = torch.empty_like(work[:, start:stop])
        for i in range(start, stop):
            column = work[:, i : i + 1]
            code = quantize(column, qparams, spec)
            codes[:, i : i + 1] = code
            error = (column - dequantize(code, qparams, spec)) / factor[i, i]
            work[:, i:stop] -= error * factor[i, i:stop]
            errors[:, i - start : i - start + 1] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result, note


def asymmetric_target(weight: Tensor, curvature: Curvature, strength: float) -> Tensor:
    """W + s W D (H + lambda I)^-1: the weight whose output on X comes nearest to the target.

    weight: [O, I]. The target is W (X + s (X_full - X)): at strength s = 0 the layer's own output
    on its quantized inputs, at 1 that of full precision. W itself without a drift, and where the
    damped Hessian is not positive definite.
    """
    hessian, drift = curvature
    if drift is None or strength == 0:
        return weight
    damped = hessian.clone()
    damped.diagonal()[damped.diagonal() <= 0] = 1.0
    damped.diagonal().add_(DAMPENING * _scale_of(hessian.diagonal()))
    lower, bad = torch.linalg.cholesky_ex(damped)
    if bad:
        return weight
    return weight + strength * torch.cholesky_solve((weight @ drift).T, lower).T
