"""Quantized processors: what takes the place of diffusers' own in its attention modules.

Two kinds: the plain ones, which are written out here, and those of joint attention (text and image
in one), which keep their own code around the products. The products: quant/attention.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from .attention import AttentionProducts


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
        return self.forward(
            lambda: attn, hidden_states, encoder_hidden_states, attention_mask, temb
        )

    def forward(
        self,
        held: Callable[[], Any],
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """The same; what offloads modules replaces it, and would move attn if it were an
        argument."""
        attn = held()
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
        value = self.quantized(value.float(), "value").to(value.dtype)
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
        return self.computed(
            lambda: attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )

    def computed(
        self,
        held: Callable[[], Any],
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        image_rotary_emb: Any,
    ) -> Any:
        """The same."""
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        given = {name: value for name, value in given.items() if value is not None}
        with InsteadOfAttention(self.attend) as instead:
            result = self.inner(held(), hidden_states, **given)
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

    def computed(self, *args: Any) -> Any:
        """What `forward` gives, which is replaced where modules are offloaded."""
        return self.forward(*args)

    def forward(self, *args: Any) -> Any:
        """The same."""
        return JointProcessor.computed(self, *args)

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


def _mask_per_head(attn: Any, mask: Tensor | None, rows: int, keys: int) -> Tensor | None:
    """[N, 1 or L, K] -> [N, heads, 1 or L, K], as diffusers prepares it."""
    mask = attn.prepare_attention_mask(mask, keys, rows)
    return None if mask is None else mask.reshape(rows, attn.heads, -1, mask.shape[-1])
