"""The YAML beside a CompVis checkpoint -> configurations of diffusers' modules.

What a setting of the networks means is in ldm/modules/diffusionmodules/{openaimodel,model}.py of
github.com/CompVis/latent-diffusion and github.com/Stability-AI/stablediffusion. Settings of the
networks that are not known here are errors: they could change what is computed. Settings of the
training around them are not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config import yaml_text
from ...errors import ModelError

_REQUIRED = object()
_UNCONDITIONAL = "__is_unconditional__"
# linspace between square roots, squared ("linear"), and plain linspace ("sqrt_linear")
_BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
NORM_GROUPS = 32  # everywhere in CompVis' networks
# Blocks of a U-Net, down and up.
_PLAIN = ("DownBlock2D", "UpBlock2D")
_RESNET_SAMPLERS = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
_ATTENTION = ("AttnDownBlock2D", "AttnUpBlock2D")
_CROSS_ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
TEXT_ENCODERS = ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder")


class Section:
    """One mapping of the YAML, taken apart key by key. Raises ModelError for what does not fit."""

    def __init__(self, tree: Any, file: str, where: str):
        self.file, self.where = file, where
        if not isinstance(tree, dict):
            raise self.error("is not a mapping")
        self.tree: dict[str, Any] = dict(tree)

    def error(self, what: str, hint: str = "") -> ModelError:
        hint = hint or "give the YAML that CompVis published with the checkpoint"
        return ModelError(f"{self.file}: {self.where} {what}", hint)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        value = self.tree.pop(key, default)
        if value is _REQUIRED:
            raise self.error(f"has no {key}")
        if value is not default and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise self.error(f"has {key}: {value!r}, which is not of the right type")
        return value

    def take_ints(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        values = self.take(key, (list, tuple), default)
        if not all(isinstance(v, int) for v in values):
            raise self.error(f"has {key}: {values!r}, expected whole numbers")
        return tuple(values)

    def ignore(self, *keys: str) -> None:
        """Drop settings that do not change what is computed."""
        for key in keys:
            self.tree.pop(key, None)

    def only(self, key: str, *values: Any) -> None:
        """Check a setting that may be missing, and supports no values but these."""
        value = self.tree.pop(key, values[0])
        if value not in values:
            raise self.error(f"has {key}: {value!r}, which is not supported")

    def done(self) -> None:
        if self.tree:
            key, value = next(iter(self.tree.items()))
            raise self.error(f"has {key}: {value!r}, which is not known ({len(self.tree)} such)")

    def child(self, key: str) -> Section:
        where = f"{self.where}.{key}"
        if key not in self.tree:
            raise self.error(f"has no {key}")
        return Section(self.tree.pop(key), self.file, where)


def read_yaml(path: str) -> Section:
    """model.params of the file. Raises ModelError."""
    try:
        tree = yaml_text.read_yaml(Path(path))
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror})",
            "model.compvis_config is the YAML that came with the checkpoint",
        ) from error
    except (yaml_text.YamlError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is not YAML ({error})") from error
    root = Section(tree, path, "the file").child("model")
    root.where = "model"
    target = root.take("target", str, "")
    if target.rpartition(".")[2] not in ("LatentDiffusion", ""):
        raise root.error(f"is a {target}", "only LatentDiffusion checkpoints can be read")
    return root.child("params")


def unet_options(params: Section) -> dict[str, Any]:
    """Options of UNet2DConditionModel (those with cross_attention_dim), of MultiHeadUNet2DModel
    (with num_heads), or of UNet2DModel."""
    unet = params.child("unet_config")
    _expect_target(unet, "UNetModel")
    unet = unet.child("params")
    unet.ignore("dropout", "use_checkpoint", "use_fp16", "legacy")
    unet.only("dims", 2)
    unet.only("conv_resample", True)
    unet.only("num_classes", None)
    unet.only("n_embed", None)
    width = unet.take("model_channels", int)
    channels = tuple(width * m for m in unet.take_ints("channel_mult", (1, 2, 4, 8)))
    resolutions = unet.take_ints("attention_resolutions")
    attends = [2**level in resolutions for level in range(len(channels))]
    heads, head_channels = unet.take("num_heads", int, -1), unet.take("num_head_channels", int, -1)
    unet.only("num_heads_upsample", -1, heads)
    if max(heads, head_channels) < 1:
        raise unet.error("has neither num_heads nor num_head_channels")
    size = unet.take("image_size", int)
    options = {
        # CompVis samples at the size of the model around the U-Net; Stable Diffusion's U-Net names
        # another one and says that it is not used
        "sample_size": params.take("image_size", int, size),
        "in_channels": unet.take("in_channels", int),
        "out_channels": unet.take("out_channels", int),
        "block_out_channels": channels,
        "layers_per_block": unet.take("num_res_blocks", int),
    }
    scale_shift = unet.take("use_scale_shift_norm", bool, False)
    options["resnet_time_scale_shift"] = "scale_shift" if scale_shift else "default"
    plain = _PLAIN
    if unet.take("use_spatial_transformer", bool, False):
        unet.only("resblock_updown", False)
        unet.ignore("use_new_attention_order")  # spatial transformers have none
        # diffusers takes attention_head_dim of this class for the number of heads
        options["attention_head_dim"] = (
            heads if head_channels == -1 else tuple(c // head_channels for c in channels)
        )
        options["transformer_layers_per_block"] = unet.take("transformer_depth", int, 1)
        options["cross_attention_dim"] = unet.take("context_dim", int)
        options["use_linear_projection"] = unet.take("use_linear_in_transformer", bool, False)
        attending = _CROSS_ATTENTION
    else:
        unet.only("use_new_attention_order", False)
        unet.only("context_dim", None)
        unet.only("use_linear_in_transformer", False)
        unet.ignore("transformer_depth")
        # by default diffusers has no norm in the middle where blocks scale and shift
        options["attn_norm_num_groups"] = NORM_GROUPS
        if head_channels == -1:
            options["num_heads"] = heads
        else:
            options["attention_head_dim"] = head_channels
        resnets = unet.take("resblock_updown", bool, False)
        options["downsample_type"] = options["upsample_type"] = "resnet" if resnets else "conv"
        plain = _RESNET_SAMPLERS if resnets else _PLAIN
        attending = _ATTENTION
    unet.done()
    kinds = [attending if a else plain for a in attends]
    options["down_block_types"] = tuple(down for down, _ in kinds)
    options["up_block_types"] = tuple(up for _, up in kinds[::-1])
    return options


def first_stage_options(params: Section) -> dict[str, Any]:
    """Options of VQModel (those with num_vq_embeddings) or of AutoencoderKL."""
    stage = params.child("first_stage_config")
    quantized = _expect_target(stage, "VQModelInterface", "VQModel", "AutoencoderKL") != (
        "AutoencoderKL"
    )
    stage = stage.child("params")
    network = stage.child("ddconfig")
    network.ignore("dropout")
    network.only("double_z", not quantized)
    network.only("resamp_with_conv", True)
    network.only("tanh_out", False)
    network.only("give_pre_end", False)
    network.only("use_linear_attn", False)
    attn_type = network.take("attn_type", str, "vanilla")
    if attn_type not in ("vanilla", "none"):
        raise network.error(f"has attn_type: {attn_type}, which is not supported")
    multipliers = network.take_ints("ch_mult", (1, 2, 4, 8))
    width, resolution = network.take("ch", int), network.take("resolution", int)
    attending = network.take_ints("attn_resolutions") if attn_type == "vanilla" else ()
    network.ignore("attn_resolutions")
    attends = [resolution // 2**level in attending for level in range(len(multipliers))]
    latent, embed = network.take("z_channels", int), stage.take("embed_dim", int)
    options = {
        "sample_size": resolution,
        "in_channels": network.take("in_channels", int),
        "out_channels": network.take("out_ch", int),
        "block_out_channels": tuple(width * m for m in multipliers),
        "layers_per_block": network.take("num_res_blocks", int),
        "latent_channels": latent,
        # CompVis' autoencoders attend in the middle whatever attn_resolutions says
        "mid_block_add_attention": attn_type == "vanilla",
        "scaling_factor": float(params.take("scale_factor", (int, float), 1.0)),
        "down_block_types": tuple(f"{'Attn' * a}DownEncoderBlock2D" for a in attends),
        "up_block_types": tuple(f"{'Attn' * a}UpDecoderBlock2D" for a in attends[::-1]),
    }
    network.done()
    if quantized:
        stage.only("remap", None)
        codes = stage.take("n_embed", int)
        return {**options, "vq_embed_dim": embed, "num_vq_embeddings": codes}
    if embed != latent:
        raise stage.error(f"has embed_dim {embed} and z_channels {latent}, which must be equal")
    return options


def class_embedder_options(params: Section) -> dict[str, int] | None:
    """Options of ClassEmbedder; None for an unconditional model."""
    if params.tree.get("cond_stage_config") == _UNCONDITIONAL:
        return None
    stage = params.child("cond_stage_config")
    _expect_target(stage, "ClassEmbedder", *TEXT_ENCODERS)  # text is read before
    stage = stage.child("params")
    if "n_classes" not in stage.tree:
        raise stage.error(
            "has no n_classes, so that no class is the null class of classifier-free guidance",
            "only models trained for guidance can be read, as cin256-v2",
        )
    return {
        "num_classes": stage.take("n_classes", int) - 1,  # the last one is the null class
        "embed_dim": stage.take("embed_dim", int),
    }


def schedule_options(params: Section) -> dict[str, Any]:
    """Options of DDIMScheduler, as CompVis' own DDIM sampler has them."""
    schedule = params.take("beta_schedule", str, "linear")
    if schedule not in _BETA_SCHEDULES:
        raise params.error(f"has beta_schedule: {schedule}, which is not supported")
    params.only("given_betas", None)
    prediction = params.take("parameterization", str, "eps")
    if prediction not in _PREDICTIONS:
        raise params.error(f"has parameterization: {prediction}, which is not supported")
    return {
        "num_train_timesteps": params.take("timesteps", int, 1000),
        "beta_schedule": _BETA_SCHEDULES[schedule],
        "beta_start": params.take("linear_start", float, 1e-4),
        "beta_end": params.take("linear_end", float, 2e-2),
        "prediction_type": _PREDICTIONS[prediction],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _expect_target(section: Section, *known: str) -> str:
    """The class that a part is an instance of. Raises ModelError for an unknown one."""
    target = section.take("target", str)
    name = target.rpartition(".")[2]
    if name not in known:
        raise section.error(f"is a {target}", f"supported: {', '.join(known)}")
    return name
