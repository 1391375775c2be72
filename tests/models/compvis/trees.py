"""The YAML of published CompVis models, at full size and reduced."""

from __future__ import annotations

import copy
from typing import Any

from full_size_ldm4 import CIN256_V2, VQ_F4

# models/ldm/{lsun_beds256,celeba256,ffhq256}/config.yaml: LDM-4 without a condition
LSUN_BEDS: dict[str, Any] = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "timesteps": 1000,
            "image_size": 64,
            "channels": 3,
            "concat_mode": False,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 64,
                    "in_channels": 3,
                    "out_channels": 3,
                    "model_channels": 224,
                    "attention_resolutions": [8, 4, 2],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 3, 4],
                    "num_head_channels": 32,
                },
            },
            "first_stage_config": VQ_F4,
            "cond_stage_config": "__is_unconditional__",
        },
    }
}

# models/ldm/lsun_churches256/config.yaml: LDM-8 on a KL autoencoder
LSUN_CHURCHES: dict[str, Any] = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0155,
            "timesteps": 1000,
            "loss_type": "l1",
            "image_size": 32,
            "channels": 4,
            "concat_mode": False,
            "scale_by_std": True,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 32,
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": 192,
                    "attention_resolutions": [1, 2, 4, 8],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 2, 4, 4],
                    "num_heads": 8,
                    "use_scale_shift_norm": True,
                    "resblock_updown": True,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "monitor": "val/rec_loss",
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 256,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 128,
                        "ch_mult": [1, 2, 4, 4],
                        "num_res_blocks": 2,
                        "attn_resolutions": [],
                        "dropout": 0.0,
                    },
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": "__is_unconditional__",
        },
    }
}

KL_F8 = LSUN_CHURCHES["model"]["params"]["first_stage_config"]

# configs/stable-diffusion/v1-inference.yaml of CompVis/stable-diffusion
SD_V1: dict[str, Any] = {
    "model": {
        "base_learning_rate": 0.0001,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.0120,
            "num_timesteps_cond": 1,
            "log_every_t": 200,
            "timesteps": 1000,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "image_size": 64,
            "channels": 4,
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "monitor": "val/loss_simple_ema",
            "scale_factor": 0.18215,
            "use_ema": False,
            "scheduler_config": {
                "target": "ldm.lr_scheduler.LambdaLinearScheduler",
                "params": {"warm_up_steps": [10000], "f_start": [1e-6], "f_max": [1.0]},
            },
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 32,  # not used, it says
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": 320,
                    "attention_resolutions": [4, 2, 1],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 4, 4],
                    "num_heads": 8,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 768,
                    "use_checkpoint": True,
                    "legacy": False,
                },
            },
            "first_stage_config": KL_F8,
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        },
    }
}


def changed(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy; unet__KEY, stage__KEY, dd__KEY, cond__KEY or a key of model.params -> its value.

    Ellipsis takes a key away.
    """
    tree = copy.deepcopy(tree)
    params = tree["model"]["params"]
    stage = params["first_stage_config"]["params"]
    places = {
        "unet": params["unet_config"]["params"],
        "stage": stage,
        "dd": stage["ddconfig"],
        "cond": params["cond_stage_config"],
    }
    if isinstance(places["cond"], dict):
        places["cond"] = places["cond"].setdefault("params", {})
    for name, value in changes.items():
        place, _, key = name.rpartition("__")
        target = places[place] if place else params
        target.pop(key, None)
        if value is not ...:
            target[key] = value
    return tree


# configs/stable-diffusion/v2-inference-v.yaml of Stability-AI/stablediffusion
SD_V2 = changed(
    SD_V1,
    parameterization="v",
    unet__num_heads=...,
    unet__num_head_channels=64,
    unet__use_linear_in_transformer=True,
    unet__use_fp16=True,
    unet__context_dim=1024,
    cond_stage_config={
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    },
)

_SMALL_UNET = {
    "image_size": 8,
    "unet__model_channels": 32,
    "unet__attention_resolutions": [4, 2],
    "unet__channel_mult": [1, 2, 3],
    "unet__num_res_blocks": 2,
}
_SMALL_STAGE = {
    "dd__ch": 32,
    "dd__ch_mult": [1, 2, 2],
    "dd__resolution": 32,
    "dd__num_res_blocks": 1,
}
_SMALL_VQ = {**_SMALL_STAGE, "stage__n_embed": 32}
_SMALL_COND = {"unet__context_dim": 16, "cond__n_classes": 5, "cond__embed_dim": 16}

SMALL: dict[str, dict[str, Any]] = {
    "cin256-v2": changed(CIN256_V2, **_SMALL_UNET, **_SMALL_VQ, **_SMALL_COND),
    "head-channels": changed(  # as LDM-8 ImageNet: heads of one width, an attending autoencoder
        CIN256_V2,
        **_SMALL_UNET,
        **_SMALL_VQ,
        **_SMALL_COND,
        unet__num_heads=...,
        unet__num_head_channels=16,
        unet__transformer_depth=2,
        dd__attn_resolutions=[8],
        scale_factor=0.5,
    ),
    "no-attention-in-first-stage": changed(
        CIN256_V2, **_SMALL_UNET, **_SMALL_VQ, **_SMALL_COND, dd__attn_type="none"
    ),
    "lsun_beds256": changed(LSUN_BEDS, **_SMALL_UNET, **_SMALL_VQ, unet__num_head_channels=16),
    "kl": changed(
        changed(LSUN_CHURCHES, **_SMALL_UNET, **_SMALL_STAGE),
        unet__attention_resolutions=[1, 2],
        unet__num_heads=...,
        unet__num_head_channels=16,
        unet__resblock_updown=...,
    ),
    "lsun_churches256": changed(
        changed(LSUN_CHURCHES, **_SMALL_UNET, **_SMALL_STAGE),
        unet__attention_resolutions=[1, 2],
        unet__num_heads=4,
    ),
}

_SMALL_TEXT = {"unet__context_dim": 128, "cond__max_length": 9, "unet__attention_resolutions": [2]}
SMALL_TEXT: dict[str, dict[str, Any]] = {
    "1.x": changed(SD_V1, **{**_SMALL_UNET, **_SMALL_STAGE, **_SMALL_TEXT}),
    "2.x": changed(
        SD_V2,
        **{**_SMALL_UNET, **_SMALL_STAGE, **_SMALL_TEXT},
        unet__num_head_channels=16,
    ),
}
