"""Attention whose two matrix products take quantized operands, as 8-bit integer kernels do.

Per head (Vaswani et al. 2017, eq. 1): p = softmax(scale * q k^T + mask), output = p v.
q, k, v are quantized per tensor, with ranges per timestep group; p lies in [0, 1], so its range
is fixed and its zero-point is 0. The softmax and the scale stay in float32, outside of the
integers. With a single key p is exactly 1, which every width represents.

Integer kernels multiply signed bytes, so codes enter less 128. With a' = a - 128, b' = b - 128 and
the zero-points y and z
    sum_d (a_d - y) (b_d - z) = sum_d a'_d b'_d + (128 - y) sum_d b'_d + (128 - z) sum_d (a_d - y).
In the scores the last term is one number per query, which the softmax does not see.

Two kinds of diffusers' processors: the plain ones, which are written out here, and those of joint
attention (text and image in one), which keep their own code around the products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..spec import ATTENTION_OPERANDS, FLOAT_BITS, activation_spec
from .affine import QParams, choose_qparams, fake_quantize, round_to_codes
from .layers import SteppedModule, StepState

Matmul = Callable[[Tensor, Tensor], Tensor]
"""(a int8 [B, M, K], b int8 [B, K, N]) -> a b, int32 [B, M, N], exact"""
WORTH_INTEGERS = {"macs": 2**24, "width": 256}
"""Size of one head's product, and its width, from which on integer kernels are the faster ones."""

SCORES_AT_ONCE = 2**27
"""Attention scores of one sample that floating point holds at once; more go by groups of heads."""


def probabilities_qparams(bits: int) -> QParams:
    """scale 1 / (2^bits - 1), zero_point 0 (both []): 1 is the largest code."""
    return choose_qparams(torch.zeros(()), torch.ones(()), activation_spec(bits))


class AttentionProducts(SteppedModule):
    """Both products of one attention module with quantized operands.

    Buffers, absent where bits is 32: query_scale, query_zero_point, key_..., value_..., all [G].
    bits: of q, k and v; probabilities_bits: of p. scale: of the scores; matmul: an integer kernel
    for large products of 8 bits, None: the same in floating point.
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
        at_once = max(1, SCORES_AT_ONCE // (query.shape[-2] * key.shape[-2]))
        if query.shape[1] <= at_once:
            return self._float_products(query, key, value, mask)
        parts = []
        for start in range(0, query.shape[1], at_once):
            heads = slice(start, start + at_once)
            cut = mask if mask is None or mask.shape[-3] == 1 else mask[..., heads, :, :]
            part = query[:, heads], key[:, heads], value[:, heads]
            parts.append(self._float_products(*part, cut))
        return torch.cat(parts, 1)

    def _float_products(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        scores = self._quantized(query, "query") @ self._quantized(key, "key").transpose(-1, -2)
        probabilities = _softmax(scores * self.scale, mask)
        if self.probabilities_bits != FLOAT_BITS:
            spec = activation_spec(self.probabilities_bits)
            probabilities = fake_quantize(probabilities, self.probabilities, spec)
        return probabilities @ self._quantized(value, "value")

    def _integers_pay(self, query: Tensor, key: Tensor) -> bool:
        fits = max(self.bits, self.probabilities_bits) <= 8
        width = key.shape[-1]
        macs = query.shape[-2] * key.shape[-2] * width
        large = macs >= WORTH_INTEGERS["macs"] and width >= WORTH_INTEGERS["width"]
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

    def _quantized(self, x: Tensor, operand: str) -> Tensor:
        if self.bits == FLOAT_BITS:
            return x
        return fake_quantize(x, self.operand_qparams(operand), activation_spec(self.bits))

    def extra_repr(self) -> str:
        return f"qkv {self.bits} bits, probabilities {self.probabilities_bits} bits"


# ------------------------------------------------------------------ processors


class QuantizedAttnProcessor(AttentionProducts):
    """Takes the place of diffusers' AttnProcessor or AttnProcessor2_0 in one Attention module.

    products: what AttentionProducts takes; qk_norm: whether the module's norm_q and norm_k apply
    (AttnProcessor leaves them out).
    """

    def __init__(self, *products: Any, qk_norm: bool):
        super().__init__(*products)
        self.qk_norm = qk_norm

    # diffusers reads from this signature which arguments to pass; forward would hide it
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """attn: the Attention module. hidden_states: [N, L, C] or [N, C, H, W], returned alike.

        encoder_hidden_states: [N, K, C'], for cross-attention; attention_mask: [N, 1 or L, K],
        added to the scores, or boolean with True where attention is allowed.
        """
        x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        image_shape = x.shape if x.ndim == 4 else None
        if image_shape is not None:
            x = x.flatten(2).transpose(1, 2)  # [N, H * W, C]
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross is not None:
                context = attn.norm_encoder_hidden_states(context)
        if self._keeps_to_value(context, attention_mask):
            y = self._of_one_key(attn, context, x.shape[1])
        else:
            query, key, value = self._heads(attn, x, context)
            mask = _mask_per_head(attn, attention_mask, *context.shape[:2])
            y = self.products(query.float(), key.float(), value.float(), mask).to(query.dtype)
            y = _through(attn.to_out, y.transpose(1, 2).flatten(2))
        if image_shape is not None:
            y = y.transpose(1, 2).unflatten(2, image_shape[2:])
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor

    def _keeps_to_value(self, context: Tensor, mask: Tensor | None) -> bool:
        """Whether there is one key, so that its probability is 1 and every query gets its value.

        In a graph and with integer kernels; where layers are simulated, stages listen to what
        enters every one of them, those that make the query and the key too.
        """
        unheard = self.step.traced is not None or self.matmul is not None
        return unheard and context.shape[1] == 1 and mask is None

    def _of_one_key(self, attn: Any, context: Tensor, queries: int) -> Tensor:
        """[N, 1, C'] -> [N, queries, C].

        Layer by layer the last layer sees all queries as it would otherwise: for fewer rows
        oneDNN may take another kernel, whose sums it scales in another order.
        """
        value = attn.to_v(context)
        value = self._quantized(value.float(), "value").to(value.dtype)
        if self.step.traced is not None:
            return _through(attn.to_out, value).expand(-1, queries, -1)
        return _through(attn.to_out, value.expand(-1, queries, -1))

    def _heads(self, attn: Any, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, heads, L, d], k and v [N, heads, K, d]."""
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        if self.qk_norm and attn.norm_q is not None:
            query = attn.norm_q(query)
        if self.qk_norm and attn.norm_k is not None:
            key = attn.norm_k(key)
        return query, key, value


class JointProcessor(ABC):
    """One of diffusers' processors of joint attention, `inner`, whose products `attend` computes.

    attend: takes and gives what F.scaled_dot_product_attention does, which the processor calls;
    ModelError where it does not, as with another attention backend.
    """

    inner: Any

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [N, heads, L, d], key and value [N, heads, K, d] -> [N, heads, L, d]."""

    # diffusers reads from this signature which arguments to pass
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """attn: the module; hidden_states [N, L, C] and encoder_hidden_states [N, T, C'], both
        attended to at once; what `inner` returns."""
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        given = {name: value for name, value in given.items() if value is not None}
        with InsteadOfAttention(self.attend) as instead:
            result = self.inner(attn, hidden_states, **given)
        if not instead.called:
            raise ModelError(
                f"{type(self.inner).__name__} computes attention by another backend than torch's "
                "scaled_dot_product_attention, past what is quantized",
                'take the attention backend "native"',
            )
        return result


class QuantizedJointAttnProcessor(JointProcessor, AttentionProducts):
    """Takes the place of a processor of joint attention, `inner`, and keeps what it does around
    the products. products: what AttentionProducts takes."""

    def __init__(self, *products: Any, inner: Any):
        AttentionProducts.__init__(self, *products)
        self.inner = inner

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """F.scaled_dot_product_attention for what joint attention asks of it."""
        assert not dropout_p and not is_causal and scale is None and not enable_gqa
        y = self.products(query.float(), key.float(), value.float(), attn_mask)
        return y.to(query.dtype)


class InsteadOfAttention(TorchFunctionMode):
    """Within the block, attend is called in the place of F.scaled_dot_product_attention."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend
        self.called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.called = True
            func = self.attend
        return func(*args, **(kwargs or {}))


def _through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


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


def _mask_per_head(attn: Any, mask: Tensor | None, rows: int, keys: int) -> Tensor | None:
    """[N, 1 or L, K] -> [N, heads, 1 or L, K], as diffusers prepares it."""
    mask = attn.prepare_attention_mask(mask, keys, rows)
    return None if mask is None else mask.reshape(rows, attn.heads, -1, mask.shape[-1])
