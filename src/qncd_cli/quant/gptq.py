"""GPTQ: second-order rounding of a weight matrix (Frantar et al. 2022, arXiv 2210.17323).

| here | paper |
|---|---|
| hessian [I, I] = 2 X X^T / n over n input vectors | H |
| dampening | lambda, 1% of the mean diagonal |
| feedback, from H + lambda I = (U + I) D (U + I)^T, U strictly upper triangular | |

The paper takes the rows of Cholesky(H^-1)^T for what a rounded column pushes onto the later ones.
That is the same as rounding w_k + (W - W^)_{<k} U_{<k,k} (LDLQ, Chee et al. 2023, arXiv 2307.13304,
theorem 6), for which H need not be inverted.

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
from .affine import QParams, round_between
from .integer_products import fast_in_integers, integer_product

DAMPENING = 0.01
BLOCK = 128
GRAM_BLOCK = 256
"""Rows of a Hessian that are added to at once, from their diagonal on: half of it is the other
half's mirror image. A larger value computes more of it twice, a smaller one in narrower products.
"""
CODE_OFFSET = 128
"""Codes of a byte less this are what integer products take, which are of signed bytes."""
CODE_ROWS = 1 << 14
"""Input vectors whose products of codes are summed in int32: 2^14 * 255^2 < 2^31."""
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

    def update_codes(
        self,
        codes: Tensor,
        qparams: QParams,
        layer: nn.Conv2d | nn.Linear,
        max_rows: int | None = None,
        count: float = 1.0,
    ) -> None:
        """The same from codes, uint8, of one scale and zero-point: sums in integers, exact and with
        VNNI several times as fast. count: how much each of these input vectors counts."""
        zero_point = int(qparams.zero_point) - CODE_OFFSET
        signed = (codes.to(torch.int16) - CODE_OFFSET).to(torch.int8)
        rows = input_vectors(signed, layer, max_rows, padding=zero_point)
        factor = count * float(qparams.scale) ** 2
        in_integers = fast_in_integers()
        for chunk in rows.split(CODE_ROWS):
            sums = chunk.sum(0, dtype=torch.int32)
            shift = zero_point * (len(chunk) * zero_point - sums)
            for number, part in enumerate(self._filled()):
                start = number * GRAM_BLOCK
                columns = chunk[:, start : start + GRAM_BLOCK]
                products = integer_product(columns.T, chunk[:, start:], in_integers=in_integers)
                products += shift[start:] - zero_point * sums[start : start + GRAM_BLOCK, None]
                part.add_(products.to(part), alpha=factor)
        self.count += len(rows)

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


def input_vectors(
    x: Tensor, layer: nn.Conv2d | nn.Linear, max_rows: int | None = None, padding: int = 0
) -> Tensor:
    """[N, C, H, W] or [..., I] -> [rows, I], I in the order of weight.reshape(O, -1).

    Codes stay what they are, floating point becomes float32. max_rows: take at most so many, evenly
    strided over samples and positions; only these are copied. padding: what stands for zero. Raises
    ValueError for grouped or dilated convolutions and padding given by name.
    """
    x = x.to(torch.float32) if x.is_floating_point() else x
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: _stride(len(rows), max_rows)]
    if layer.groups != 1 or layer.dilation != (1, 1) or isinstance(layer.padding, str):
        raise ValueError("no input vectors for grouped, dilated or name-padded convolutions")
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    fields = F.pad(x, (pw, pw, ph, ph), value=padding).unfold(2, kh, sh).unfold(3, kw, sw)  # a view
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


def _feedback(hessian: Tensor, order: Tensor) -> tuple[Tensor | None, float]:
    """U + I of the damped Hessian whose rows and columns are in this order, both axes reversed (a
    lower triangle), and lambda / mean(diag H).

    Dampening starts at 1% and is raised tenfold until the Cholesky factorisation exists;
    (None, lambda) when it never does. Inputs that are always zero count as if they were one.
    """
    mean, dampening = _scale_of(hessian.diagonal()), DAMPENING
    reverse = order.flip(0)
    for _ in range(MAX_DAMPENING_TRIES):
        damped = hessian.index_select(0, reverse).index_select(1, reverse)
        damped.diagonal().add_(dampening * mean)
        lower, bad = torch.linalg.cholesky_ex(damped)
        if not bad:
            return lower.div_(lower.diagonal().clone()), dampening
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
    dead = hessian.diagonal() <= 0
    if dead.any():
        hessian = hessian.clone()
        hessian.diagonal()[dead] = 1.0
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    lower, dampening = _feedback(hessian, order)
    if lower is None:
        return None, "Hessian not positive definite: nearest rounding"
    note = "" if dampening == DAMPENING else f"dampening {dampening:g}"
    size = len(hessian)
    columns = weight[:, order].T.contiguous()  # a column of the weight is a row here
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    zero_point = qparams.zero_point.to(columns)
    low, high = spec.qmin - zero_point, spec.qmax - zero_point
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        target = columns[start:stop].clone()
        if start:  # what all columns before the block push onto it
            pushed = lower[size - start :, size - stop : size - start].T @ errors[:start].flip(0)
            target += pushed.flip(0)
        inside = lower[size - stop : size - start, size - stop : size - start].flip(0, 1)
        rows = zip(target, columns[start:stop], codes[start:stop], errors[start:stop], strict=True)
        for i, (wanted, column, code, error) in enumerate(rows):
            round_between(wanted, qparams.scale, low, high, code)
            torch.addcmul(column, code, qparams.scale, value=-1, out=error)
            target[i + 1 :].addr_(inside[i, i + 1 :], error)
    result = torch.empty_like(weight, dtype=torch.int32)
    result[:, order] = codes.add_(zero_point).T.to(torch.int32)
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
