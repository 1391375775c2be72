"""CompVis' latent diffusion in plain torch: its module names and its arithmetic, as published.

Written from the architecture (ADM's U-Net, arXiv 2105.05233; LDM, arXiv 2112.10752; names as in
the public repository CompVis/latent-diffusion), knowing nothing of qncd_cli or of diffusers: what
is converted is compared with what is computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCHEDULE_BUFFERS = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


# ---- U-Net ---------------------------------------------------------------------------------------


class Resample(nn.Module):
    """By 2; with a convolution named `op` (down) or `conv` (up), or without one."""

    def __init__(self, channels: int, way: str, learned: bool):
        super().__init__()
        self.way = way
        if learned and way == "down":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        elif learned:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "down":
            return self.op(x) if hasattr(self, "op") else F.avg_pool2d(x, 2)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class ResBlock(nn.Module):
    def __init__(self, cin: int, cemb: int, cout: int, scale_shift: bool, resample: str = ""):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cemb, cout * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, cout), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(cout, cout, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)
        self.resample = Resample(cin, resample, False) if resample else nn.Identity()
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        added = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = added.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + added)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """q, k and v of a head stand together in the output of qkv."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # [N, C, T]
        n, c, length = flat.shape
        qkv = self.qkv(self.norm(flat)).view(n, self.heads, 3, c // self.heads, length)
        q, k, v = qkv.unbind(2)  # [N, heads, d, T]
        weight = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(c // self.heads), dim=-1)
        h = (v @ weight.transpose(2, 3)).reshape(n, c, length)
        return (flat + self.proj_out(h)).view_as(x)


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:  # [N, T, C] -> [N, heads, T, d]
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        weight = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        return self.to_out((weight @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.proj = nn.Linear(cin, 2 * cout)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        wide = 4 * channels
        self.net = nn.Sequential(GEGLU(channels, wide), nn.Dropout(0.0), nn.Linear(wide, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """linear: projections of tokens instead of convolutions of size 1."""

    def __init__(self, channels: int, context: int, heads: int, depth: int, linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.linear = linear
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context, heads) for _ in range(depth)
        )
        self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)  # [N, H W, C]
        tokens = self.proj_in(tokens) if self.linear else tokens
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens) if self.linear else tokens
        h = tokens.transpose(1, 2).reshape(h.shape)
        return x + (h if self.linear else self.proj_out(h))


class Row(nn.Sequential):
    """One entry of input_blocks, middle_block or output_blocks."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:  # type: ignore
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """params: unet_config.params of the YAML."""

    def __init__(self, params: dict[str, Any]):
        super().__init__()
        self.params = params
        width, blocks = params["model_channels"], params["num_res_blocks"]
        mults, attending = params["channel_mult"], params["attention_resolutions"]
        emb = 4 * width
        shift = params.get("use_scale_shift_norm", False)
        updown = params.get("resblock_updown", False)
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([Row(nn.Conv2d(params["in_channels"], width, 3, 1, 1))])
        skips, ch, ds = [width], width, 1
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                row: list[nn.Module] = [ResBlock(ch, emb, mult * width, shift)]
                ch = mult * width
                if ds in attending:
                    row.append(self.attention(ch))
                self.input_blocks.append(Row(*row))
                skips.append(ch)
            if level < len(mults) - 1:
                down = (
                    ResBlock(ch, emb, ch, shift, "down") if updown else Resample(ch, "down", True)
                )
                self.input_blocks.append(Row(down))
                skips.append(ch)
                ds *= 2
        self.middle_block = Row(
            ResBlock(ch, emb, ch, shift), self.attention(ch), ResBlock(ch, emb, ch, shift)
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(mults))):
            for i in range(blocks + 1):
                row = [ResBlock(ch + skips.pop(), emb, mults[level] * width, shift)]
                ch = mults[level] * width
                if ds in attending:
                    row.append(self.attention(ch))
                if level and i == blocks:
                    up = ResBlock(ch, emb, ch, shift, "up") if updown else Resample(ch, "up", True)
                    row.append(up)
                    ds //= 2
                self.output_blocks.append(Row(*row))
        self.out = nn.Sequential(
            nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(width, params["out_channels"], 3, padding=1)
        )

    def attention(self, channels: int) -> nn.Module:
        per_head = self.params.get("num_head_channels", -1)
        heads = self.params["num_heads"] if per_head == -1 else channels // per_head
        if not self.params.get("use_spatial_transformer", False):
            return AttentionBlock(channels, heads)
        depth = self.params.get("transformer_depth", 1)
        linear = self.params.get("use_linear_in_transformer", False)
        return SpatialTransformer(channels, self.params["context_dim"], heads, depth, linear)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        half = self.width // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        h, skips = x, []
        for row in self.input_blocks:
            h = row(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for row in self.output_blocks:
            h = row(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


# ---- first stage ---------------------------------------------------------------------------------


class AutoencoderResnet(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AutoencoderAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))  # [N, C, T]
        weight = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ weight.transpose(1, 2)).view_as(x))


def _middle(channels: int, attention: bool) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = AutoencoderResnet(channels, channels)
    mid.attn_1 = AutoencoderAttention(channels) if attention else nn.Identity()
    mid.block_2 = AutoencoderResnet(channels, channels)
    return mid


def _through(mid: Any, h: Tensor) -> Tensor:
    return mid.block_2(mid.attn_1(mid.block_1(h)))


class Stage(nn.Module):
    """One resolution; its resampler is added by name where there is one."""

    def __init__(self, cin: int, cout: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(
            AutoencoderResnet(cin if i == 0 else cout, cout) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AutoencoderAttention(cout) for _ in range(blocks * attention))

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return h


class Sampler(nn.Module):
    def __init__(self, channels: int, way: str):
        super().__init__()
        self.way = way
        down = way == "down"
        self.conv = nn.Conv2d(channels, channels, 3, 2 if down else 1, 0 if down else 1)

    def forward(self, h: Tensor) -> Tensor:
        if self.way == "down":
            return self.conv(F.pad(h, (0, 1, 0, 1)))
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    def __init__(self, dd: dict[str, Any]):
        super().__init__()
        widths = [dd["ch"] * m for m in dd["ch_mult"]]
        vanilla = dd.get("attn_type", "vanilla") == "vanilla"
        self.conv_in = nn.Conv2d(dd["in_channels"], dd["ch"], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = vanilla and dd["resolution"] // 2**i in dd["attn_resolutions"]
            before = dd["ch"] if i == 0 else widths[i - 1]
            stage = Stage(before, width, dd["num_res_blocks"], attends)
            if i < len(widths) - 1:
                stage.downsample = Sampler(width, "down")
            self.down.append(stage)
        self.mid = _middle(widths[-1], vanilla)
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], dd["z_channels"] * (1 + dd["double_z"]), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
            h = stage.downsample(h) if hasattr(stage, "downsample") else h
        return self.conv_out(F.silu(self.norm_out(_through(self.mid, h))))


class Decoder(nn.Module):
    def __init__(self, dd: dict[str, Any]):
        super().__init__()
        widths = [dd["ch"] * m for m in dd["ch_mult"]]
        vanilla = dd.get("attn_type", "vanilla") == "vanilla"
        self.conv_in = nn.Conv2d(dd["z_channels"], widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], vanilla)
        stages: list[nn.Module] = []
        for i, width in enumerate(widths):
            attends = vanilla and dd["resolution"] // 2**i in dd["attn_resolutions"]
            before = widths[min(i + 1, len(widths) - 1)]
            stage = Stage(before, width, dd["num_res_blocks"] + 1, attends)
            if i:
                stage.upsample = Sampler(width, "up")
            stages.append(stage)
        self.up = nn.ModuleList(stages)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], dd["out_ch"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = _through(self.mid, self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
            h = stage.upsample(h) if hasattr(stage, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


class FirstStage(nn.Module):
    """params: first_stage_config.params; with n_embed it looks latents up in a codebook."""

    def __init__(self, params: dict[str, Any]):
        super().__init__()
        dd, embed = params["ddconfig"], params["embed_dim"]
        self.encoder, self.decoder = Encoder(dd), Decoder(dd)
        if "n_embed" in params:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(params["n_embed"], embed)
        wide = 1 + dd["double_z"]
        self.quant_conv = nn.Conv2d(wide * dd["z_channels"], wide * embed, 1)
        self.post_quant_conv = nn.Conv2d(embed, dd["z_channels"], 1)

    def encode(self, images: Tensor) -> Tensor:
        """Before the codebook, or mean and log variance."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        if hasattr(self, "quantize"):
            flat = z.movedim(1, -1).flatten(0, -2)
            nearest = torch.cdist(flat.double(), self.quantize.embedding.weight.double()).argmin(1)
            z = self.quantize.embedding(nearest).view_as(z.movedim(1, -1)).movedim(-1, 1)
        return self.decoder(self.post_quant_conv(z))


# ---- text encoders of Stable Diffusion -----------------------------------------------------------


@dataclass(frozen=True)
class TextSizes:
    """heads: of 64 channels."""

    vocabulary: int
    positions: int
    width: int
    layers: int


VIT_L_14 = TextSizes(49408, 77, 768, 12)
VIT_H_14 = TextSizes(49408, 77, 1024, 24)


class ClipAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:  # [N, T, C] -> [N, heads, T, 64]
            return y.unflatten(2, (-1, 64)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        scores = q @ k.transpose(2, 3) / 8
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weight = torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1)
        return self.out_proj((weight @ v).transpose(1, 2).flatten(2))


class ClipLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.self_attn = ClipAttention(width)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # QuickGELU


class Clip(nn.Module):
    """OpenAI's text encoder under the names that transformers gave it (arXiv 2103.00020)."""

    def __init__(self, sizes: TextSizes):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.text_model = model = nn.Module()
        model.embeddings = nn.Module()
        model.embeddings.token_embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        model.embeddings.position_embedding = nn.Embedding(sizes.positions, sizes.width)
        model.embeddings.register_buffer("position_ids", torch.arange(sizes.positions)[None])
        model.encoder = nn.Module()
        model.encoder.layers = nn.ModuleList(ClipLayer(sizes.width) for _ in range(sizes.layers))
        model.final_layer_norm = nn.LayerNorm(sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.transformer.text_model
        x = model.embeddings.token_embedding(tokens)
        x = x + model.embeddings.position_embedding.weight[: tokens.shape[1]]
        for layer in model.encoder.layers:
            x = layer(x)
        return model.final_layer_norm(x)


class OpenClipBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClip(nn.Module):
    """Its text encoder under its own names; the last layer is there and not run."""

    def __init__(self, sizes: TextSizes):
        super().__init__()
        self.model = nn.Module()
        self.model.transformer = nn.Module()
        self.model.transformer.resblocks = nn.ModuleList(
            OpenClipBlock(sizes.width) for _ in range(sizes.layers)
        )
        self.model.token_embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.model.positional_embedding = nn.Parameter(torch.randn(sizes.positions, sizes.width))
        self.model.ln_final = nn.LayerNorm(sizes.width)
        self.model.text_projection = nn.Parameter(torch.randn(sizes.width, sizes.width))
        self.model.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        x = (model.token_embedding(tokens) + model.positional_embedding).transpose(0, 1)
        mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
        for block in model.transformer.resblocks[:-1]:
            x = block(x, mask)
        return model.ln_final(x.transpose(0, 1))


def cond_stage(stage: dict[str, Any], text: TextSizes | None) -> nn.Module:
    """text: None for the published size."""
    if stage["target"].endswith("FrozenOpenCLIPEmbedder"):
        return OpenClip(text or VIT_H_14)
    if stage["target"].endswith("FrozenCLIPEmbedder"):
        return Clip(text or VIT_L_14)
    embedder, options = nn.Module(), stage["params"]
    embedder.embedding = nn.Embedding(options["n_classes"], options["embed_dim"])
    return embedder


# ---- the whole -----------------------------------------------------------------------------------


class LatentDiffusion(nn.Module):
    """tree: the YAML. Random weights of which none is zero; the seed is the caller's."""

    def __init__(self, tree: dict[str, Any], text: TextSizes | None = None):
        super().__init__()
        params = tree["model"]["params"]
        self.model = nn.Module()
        self.model.diffusion_model = UNetModel(params["unet_config"]["params"])
        self.first_stage_model = FirstStage(params["first_stage_config"]["params"])
        if params["cond_stage_config"] != "__is_unconditional__":
            self.cond_stage_model = cond_stage(params["cond_stage_config"], text)
        for name, parameter in self.named_parameters():
            if "norm" in name or name.endswith("bias"):  # else all alike, and a swap goes unseen
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        start, end = params["linear_start"] ** 0.5, params["linear_end"] ** 0.5
        betas = torch.linspace(start, end, params["timesteps"], dtype=torch.float64) ** 2
        self.register_buffer("betas", betas.float())
        for name in SCHEDULE_BUFFERS:  # nobody reads them
            self.register_buffer(name, torch.zeros(params["timesteps"]))

    def eps(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        context = None
        if labels is not None:
            context = self.cond_stage_model.embedding(labels)[:, None]  # type: ignore
        return self.model.diffusion_model(x, t, context)  # type: ignore

    def averages(self) -> dict[str, Tensor]:
        """Buffers of LitEma over `model`: the names without their dots."""
        found = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        for name, parameter in self.model.named_parameters():
            found["model_ema." + name.replace(".", "")] = parameter.detach().clone()
        return found
