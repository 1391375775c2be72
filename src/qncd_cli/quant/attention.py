"""Attention whose two matrix products take quantized operands, as 8-bit integer kernels do.

Per head (Vaswani et al. 2017, eq. 1): p = softmax(scale * q k^T + mask), output = p v.
q, k, v are quantized per tensor, with ranges per timestep group; p lies in [0, 1], so its range
is fixed and its zero-point is 0. The softmax and the scale stay in float32, outside of the
integers. With a single key p is exactly 1, which every width represents.

Integer kernels multiply signed bytes, so codes enter less 128. With a' = a - 128, b' = b - 128 and
the zero-points y and z
    sum_d (a_d - y) (b_d - z) = sum_d a'_d b'_d + (128 - y) sum_d b'_d + (128 - z) sum_d (a_d - y).
In the scores the last term is one number per query, which the softmax does not see.

Which processors of diffusers compute with these products: quant/attention_processors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..spec import ATTENTION_OPERANDS, FLOAT_BITS, activation_spec
from .affine import QParams, choose_qparams, fake_quantize, round_to_codes
from .layers import SteppedModule, StepState

Matmul = Callable[[Tensor, Tensor], Tensor]
"""(a int8 [B, M, K], b int8 [B, K, N]) -> a b, int32 [B, M, N], exact"""
WORTH_INTEGERS = {"macs": 2**24, "width": 256}
"""Size of one head's product, and its width, from which on a CPU's kernels are the faster ones."""

SCORES_AT_ONCE = 2**22
"""Attention scores that floating point holds at once; more go by groups of samples, and of heads.
Larger: memory of a few times 4 bytes each, which the system hands over anew at every call."""
GRAPH_SCORES = 2**27
"""The same of one sample in a graph, which holds every group's operators."""


def probabilities_qparams(bits: int) -> QParams:
    """scale 1 / (2^bits - 1), zero_point 0 (both []): 1 is the largest code."""
    return choose_qparams(torch.zeros(()), torch.ones(()), activation_spec(bits))


class AttentionProducts(SteppedModule):
    """Both products of one attention module with quantized operands.

    Buffers, absent where bits is 32: query_scale, query_zero_point, key_..., value_..., all [G].
    bits: of q, k and v; probabilities_bits: of p. scale: of the scores; matmul: an integer kernel
    for large products of 8 bits, None: the same in floating point. worth: which are large, where
    it is not as WORTH_INTEGERS says.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        bits: int,
        probabilities_bits: int,
        step: StepState,
        scale: float,
        matmul: Matmul | None = None,
    ):
        super().__init__(step)
        self.matmul = matmul
        self.worth: Mapping[str, int] | None = None
        self.softmax_codes = softmax_codes
        self.bits = bits
        self.probabilities_bits = probabilities_bits
        self.scale = scale
        if probabilities_bits != FLOAT_BITS:
            self.probabilities = probabilities_qparams(probabilities_bits)
        for operand in ATTENTION_OPERANDS if bits != FLOAT_BITS else ():
            for part in ("scale", "zero_point"):
                self.register_table(f"{operand}_{part}", tensors[f"{operand}_{part}"])

    def products(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [N, heads, L, d], key and value [N, heads, K, d], float32 -> [N, heads, L, d].

        mask: broadcast to the scores. The operands of both products are the values
        (q - zero_point) * scale that integer kernels multiply.
        """
        if self._integers_pay(query, key):
            return self._integer_products(query, key, value, mask)
        most = SCORES_AT_ONCE if self.step.traced is None else GRAPH_SCORES
        at_once = max(1, most // (query.shape[-2] * key.shape[-2]))  # matrices of scores
        samples, heads = query.shape[:2]
        if self.step.traced is None and samples > 1 and samples * heads > at_once:
            return self._by_parts(0, max(1, at_once // heads), query, key, value, mask)
        if heads > at_once:
            return self._by_parts(1, at_once, query, key, value, mask)
        return self._float_products(query, key, value, mask)

    def _by_parts(
        self, axis: int, size: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """`products`, so many samples (axis 0) or heads (axis 1) at a time."""
        masks: Sequence[Tensor | None] = [mask] * -(-query.shape[axis] // size)
        if mask is not None:
            mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
            if mask.shape[axis] > 1:
                masks = mask.split(size, axis)
        operands = (x.split(size, axis) for x in (query, key, value))
        parts = [self.products(*part) for part in zip(*operands, masks, strict=True)]
        return torch.cat(parts, axis)

    def _float_products(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        scores = self.quantized(query, "query") @ self.quantized(key, "key").transpose(-1, -2)
        probabilities = _softmax(scores * self.scale, mask)
        if self.probabilities_bits != FLOAT_BITS:
            spec = activation_spec(self.probabilities_bits)
            probabilities = fake_quantize(probabilities, self.probabilities, spec)
        return probabilities @ self.quantized(value, "value")

    def _integers_pay(self, query: Tensor, key: Tensor) -> bool:
        fits = max(self.bits, self.probabilities_bits) <= 8
        width = key.shape[-1]
        macs = query.shape[-2] * key.shape[-2] * width
        least = self.worth or WORTH_INTEGERS
        large = macs >= least["macs"] and width >= least["width"]
        return self.matmul is not None and fits and large

    def _integer_products(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """`products` by the integer kernel, up to float rounding."""
        assert self.matmul is not None
        heads = query.shape[:2]
        q_scale, q_zero_point = self.operand_qparams("query")
        k_scale, _ = self.operand_qparams("key")
        v_scale, v_zero_point = self.operand_qparams("value")
        q, k, v = (
            self._signed(x, self.operand_qparams(operand), self.bits)
            for x, operand in ((query, "query"), (key, "key"), (value, "value"))
        )
        sums = self.matmul(q, k.transpose(1, 2))
        shift = (128 - q_zero_point) * _sum(k, -1)
        factor = q_scale * k_scale * self.scale
        if mask is None:
            p, p_sums = self.softmax_codes(sums, shift, factor, self.probabilities_bits)
        else:
            sums = (sums + shift.unsqueeze(1)).unflatten(0, heads)
            probabilities = _softmax(sums.float() * factor, mask)
            p = self._signed(probabilities, self.probabilities, self.probabilities_bits)
            p_sums = _sum(p, -1)
        p_sums = p_sums + 128 * p.shape[-1]
        sums = self.matmul(p, v) + 128 * _sum(v, 1).unsqueeze(1)
        sums = sums + (128 - v_zero_point) * p_sums.unsqueeze(-1)
        return sums.unflatten(0, heads).float() * (self.probabilities.scale * v_scale)

    def _signed(self, x: Tensor, qparams: QParams, bits: int) -> Tensor:
        """Codes less 128, int8, all heads in one dimension: [N * heads, ...]."""
        return _signed_codes(x, qparams, bits).flatten(0, 1)

    def operand_qparams(self, operand: str) -> QParams:
        """Range of the query, key or value at the current timestep group."""
        zero_point = self.now(f"{operand}_zero_point").to(torch.int32)  # float32 in a graph
        return QParams(self.now(f"{operand}_scale"), zero_point)

    def quantized(self, x: Tensor, operand: str) -> Tensor:
        """x as the integers of the query, key or value stand for it."""
        if self.bits == FLOAT_BITS:
            return x
        return fake_quantize(x, self.operand_qparams(operand), activation_spec(self.bits))

    def extra_repr(self) -> str:
        return f"qkv {self.bits} bits, probabilities {self.probabilities_bits} bits"


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """mask: added to the scores, or boolean with True where attention is allowed."""
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


def softmax_codes(sums: Tensor, shift: Tensor, factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of softmax(factor * (sums + shift)), less 128, int8 [B, L, K], and their sums [B, L].

    sums: int32 [B, L, K]; shift: int32 [B, K]; factor: positive, one number. The
    largest is found and taken off as an integer: one pass less over the scores, no rounding.
    """
    sums = sums + shift.unsqueeze(1)
    powers = ((sums - sums.amax(-1, keepdim=True)).float() * factor).exp()
    p = _signed_codes(powers / powers.sum(-1, keepdim=True), probabilities_qparams(bits), bits)
    return p, _sum(p, -1)


def _signed_codes(x: Tensor, qparams: QParams, bits: int) -> Tensor:
    """Codes less 128, int8."""
    return (round_to_codes(x, qparams, activation_spec(bits)) - 128).to(torch.int8)


def _sum(codes: Tensor, dim: int) -> Tensor:
    """Sum of signed bytes along one axis, int32."""
    return codes.sum(dim, dtype=torch.int32)
