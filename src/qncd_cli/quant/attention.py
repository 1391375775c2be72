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
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query, key, value, mask), quantized already -> output"""
Attention = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
"""(query, key, value, scale, bits of the probabilities) -> output, without a mask"""
ByteAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(query, key, value, shift, factor, bits of p): codes less 128 and what `softmax_codes` takes ->
sums of p value, int32 [B, L, d], and of p, int32 [B, L]"""
WORTH_ATTENTION = 2**18
"""Scores of one head from which on a graph calls such a kernel: they are memory of their own, which
it never writes out."""
WORTH_INTEGERS = {"macs": 2**24, "width": 256}
"""Size of one head's product, and its width, from which on a CPU's kernels are the faster ones."""

SCORES_AT_ONCE = 2**22
"""Attention scores that are held at once; more go by groups of samples, of heads, of queries.
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
    it is not as WORTH_INTEGERS says. attention, byte_attention: both products by one kernel, in
    floating point and in integers.
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
        self.attention: Attention | None = None
        self.byte_attention: ByteAttention | None = None
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
        named = list(zip(ATTENTION_OPERANDS, (query, key, value), strict=True))
        if self._integers_pay(query, key):
            q, k, v = (_signed_codes(x, self.operand_qparams(name), self.bits) for name, x in named)
            return self._by_parts(self._integer_products, q, k, v, mask)
        q, k, v = (self.quantized(x, name) for name, x in named)
        large = query.shape[-2] * key.shape[-2] >= WORTH_ATTENTION
        if self.attention is not None and mask is None and large:
            return self.attention(q, k, v, self.scale, self.probabilities_bits)
        return self._by_parts(self._float_products, q, k, v, mask)

    def _by_parts(
        self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """attend(query, key, value, mask) for so many samples, heads or queries at a time that
        scores stay few."""
        samples, heads, queries = query.shape[:3]
        traced = self.step.traced is not None
        at_once = max(1, (GRAPH_SCORES if traced else SCORES_AT_ONCE) // key.shape[-2])
        if not traced and samples > 1 and samples * heads * queries > at_once:
            axis, size = 0, at_once // (heads * queries)
        elif heads > 1 and heads * queries > at_once:
            axis, size = 1, at_once // queries
        elif queries > at_once:
            axis, size = 2, at_once
        else:
            return attend(query, key, value, mask)
        size = max(1, size)
        count = -(-query.shape[axis] // size)
        if mask is not None:
            mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        keys, values = ([x] * count if axis == 2 else x.split(size, axis) for x in (key, value))
        masks: Sequence[Tensor | None] = [mask] * count
        if mask is not None and mask.shape[axis] > 1:
            masks = mask.split(size, axis)
        parts = zip(query.split(size, axis), keys, values, masks, strict=True)
        return torch.cat([self._by_parts(attend, *part) for part in parts], axis)

    def _float_products(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Output of operands that `quantized` has made."""
        probabilities = _softmax(query @ key.transpose(-1, -2) * self.scale, mask)
        if self.probabilities_bits != FLOAT_BITS:
            spec = activation_spec(self.probabilities_bits)
            probabilities = fake_quantize(probabilities, self.probabilities, spec)
        return probabilities @ value

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
        """The same of codes less 128, int8, by the integer kernel: equal up to float rounding."""
        assert self.matmul is not None
        heads = query.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        q_scale, q_zero_point = self.operand_qparams("query")
        k_scale, _ = self.operand_qparams("key")
        v_scale, v_zero_point = self.operand_qparams("value")
        shift = (128 - q_zero_point) * _sum(k, -1)
        factor = q_scale * k_scale * self.scale
        if mask is None and self.byte_attention is not None:
            operands = shift, factor, self.probabilities_bits
            sums, p_sums = self.byte_attention(q, k, v, *operands)
        else:
            sums = self.matmul(q, k.transpose(1, 2))
            p, p_sums = self._probability_codes(sums, shift, factor, mask, heads)
            sums = self.matmul(p, v)
        p_sums = p_sums + 128 * key.shape[-2]
        sums = sums + 128 * _sum(v, 1).unsqueeze(1)
        sums = sums + (128 - v_zero_point) * p_sums.unsqueeze(-1)
        return sums.unflatten(0, heads).float() * (self.probabilities.scale * v_scale)

    def _probability_codes(
        self,
        sums: Tensor,
        shift: Tensor,
        factor: Tensor,
        mask: Tensor | None,
        heads: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """What `softmax_codes` returns, with a mask too. heads: [N, heads] that sums' first axis
        is of."""
        if mask is None:
            return self.softmax_codes(sums, shift, factor, self.probabilities_bits)
        sums = (sums + shift.unsqueeze(1)).unflatten(0, heads)
        probabilities = _softmax(sums.float() * factor, mask)
        p = _signed_codes(probabilities, self.probabilities, self.probabilities_bits)
        p = p.flatten(0, 1)
        return p, _sum(p, -1)

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
