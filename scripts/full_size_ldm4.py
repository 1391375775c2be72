#!/usr/bin/env python
"""A full-size LDM-4 ImageNet checkpoint as CompVis publishes it, with random weights.

    python scripts/full_size_ldm4.py write full    # full/model.ckpt (1.8 GB) and full/config.yaml
    python scripts/full_size_ldm4.py check full    # what qncd makes of it, against plain torch

    qncd calibrate --config ldm4_w4a8 --run-dir full/run --set model.source=full/model.ckpt \\
      --set model.compvis_config=full/config.yaml --set sampling.steps=4 \\
      --set calibration.trajectories=2 --set calibration.noise_trajectories=1 \\
      --set calibration.batch_size=2
    qncd quantize --run-dir full/run
    qncd sample --run-dir full/run --steps 4 --num 2

Names, shapes and arithmetic of the checkpoint are those of tests/oracles/compvis_reference.py,
which knows nothing of qncd_cli or of diffusers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from qncd_cli.models.compvis.checkpoint import compvis_pipeline

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "oracles"))

from compvis_reference import LatentDiffusion

SEED = 0
BOUND = 1e-5
"""On differences from plain torch, in units of the value where that is above 1."""

VQ_F4: dict[str, Any] = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 2, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}

# configs/latent-diffusion/cin256-v2.yaml: LDM-4 ImageNet
CIN256_V2: dict[str, Any] = {
    "model": {
        "base_learning_rate": 0.0001,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "num_timesteps_cond": 1,
            "log_every_t": 200,
            "timesteps": 1000,
            "first_stage_key": "image",
            "cond_stage_key": "class_label",
            "image_size": 64,
            "channels": 3,
            "cond_stage_trainable": True,
            "conditioning_key": "crossattn",
            "monitor": "val/loss",
            "use_ema": False,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 64,
                    "in_channels": 3,
                    "out_channels": 3,
                    "model_channels": 192,
                    "attention_resolutions": [8, 4, 2],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 3, 5],
                    "num_heads": 1,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 512,
                },
            },
            "first_stage_config": VQ_F4,
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.ClassEmbedder",
                "params": {"n_classes": 1001, "embed_dim": 512, "key": "class_label"},
            },
        },
    }
}


@click.group()
def cli() -> None:
    """Write or check a full-size LDM-4 checkpoint with random weights."""


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
def write(folder: Path) -> None:
    """model.ckpt and config.yaml into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    model = LatentDiffusion(CIN256_V2)
    state = {"epoch": 0, "global_step": 0, "state_dict": model.state_dict()}
    torch.save(state, folder / "model.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(CIN256_V2, sort_keys=False))
    size = (folder / "model.ckpt").stat().st_size
    print(f"{folder / 'model.ckpt'}: {len(state['state_dict'])} tensors, {size / 1e9:.2f} GB")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
def check(folder: Path) -> None:
    """Compare what qncd converts FOLDER to with the computation in plain torch."""
    found = differences(folder)
    for what, difference in found.items():
        print(f"{what}: differs by at most {difference:.1e}")
    if max(found.values()) > BOUND:
        print(f"more than {BOUND}", file=sys.stderr)
        sys.exit(1)


@torch.no_grad()
def differences(folder: Path, side: int = 64) -> dict[str, float]:
    """Largest |ours - theirs| / max(1, |theirs|) of one prediction and of one decoded image.

    side: of the latent that is decoded, 64 in sampling; the decoder's weights are the same for any.
    The first stage in float64: in float32 its 4096 tokens' attention and 30 convolutions leave
    rounding of 2e-5 in single pixels.
    """
    checkpoint, config = folder / "model.ckpt", folder / "config.yaml"
    with torch.device("meta"):  # its weights are the stored ones
        theirs: Any = LatentDiffusion(yaml.safe_load(config.read_text())).eval()
    stored = torch.load(checkpoint, weights_only=True, mmap=True)["state_dict"]
    theirs.load_state_dict(stored, assign=True)
    ours: Any = compvis_pipeline(str(checkpoint), str(config))
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, 3, 64, 64, generator=generator)
    t, labels = torch.tensor([501]), torch.tensor([207])
    expected = theirs.eps(x, t, labels)
    predicted = ours.unet(x, t, **ours.condition(labels)).sample
    found = {"prediction of noise, float32": _difference(predicted, expected)}
    latent = x[..., :side, :side].double()
    image = theirs.first_stage_model.double().decode(latent)
    decoded = ours.vqvae.double().decode(latent).sample
    return {**found, "decoded image, float64": _difference(decoded, image)}


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


if __name__ == "__main__":
    cli()
