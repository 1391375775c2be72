"""A tiny random model of the packaged model's kind, and the command line run in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the model is tiny: more threads only wait for each other


def save_tiny_pipeline(folder: Path, seed: int = 0, **unet_options) -> None:
    """A class-conditional latent diffusion pipeline with about 0.3 M random parameters."""
    from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel

    from qncd_cli.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

    torch.manual_seed(seed)
    options = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**{**options, **unet_options})
    vqvae = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=4,
        scaling_factor=1.0,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    ClassConditionalLDMPipeline(unet, vqvae, ClassEmbedder(4, 16), scheduler).save_pretrained(
        folder
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_pipeline(folder)
    return folder


def tiny_config(model: Path, **changes) -> dict:
    """A configuration tree for the tiny model; changes are dotted keys with __ for the dot."""
    tree: dict = {
        "model": {"source": str(model)},
        "sampling": {"steps": 4, "guidance_scale": 2.0},
        "calibration": {"trajectories": 6, "batch_size": 3, "noise_trajectories": 3},
        "quantization": {
            "weights": {"bits": 4, "rounding": "gptq"},
            "activations": {"bits": 8, "observer": "mse"},
        },
        "correction": {"intra": "embedding", "inter": {"method": "ptqd"}},
        "evaluation": {"num_samples": 4},
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


class Qncd:
    """Runs the command line in one folder; results have exit_code, stdout, stderr and data."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write_config(self, tree: dict, name: str = "tiny.yaml") -> None:
        (self.folder / name).write_text(yaml.safe_dump(tree))

    def __call__(self, *arguments: str, ok: bool = True) -> SimpleNamespace:
        from qncd_cli.cli.main import cli

        before = Path.cwd()
        os.chdir(self.folder)
        try:
            result = CliRunner().invoke(cli, [str(a) for a in arguments])
        finally:
            os.chdir(before)
        if ok:
            assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
        data = json.loads(result.stdout) if ok and "--json" in arguments else None
        return SimpleNamespace(
            exit_code=result.exit_code, stdout=result.stdout, stderr=result.stderr, data=data
        )


@pytest.fixture
def qncd(tmp_path, tiny_model) -> Qncd:
    """The command line in an empty folder with tiny.yaml."""
    runner = Qncd(tmp_path)
    runner.write_config(tiny_config(tiny_model))
    return runner


@pytest.fixture(scope="session")
def sampled(tmp_path_factory, tiny_model) -> Path:
    """A folder in which the tiny model is calibrated, quantized, sampled. Copy before changing."""
    folder = tmp_path_factory.mktemp("sampled")
    runner = Qncd(folder)
    runner.write_config(tiny_config(tiny_model))
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    runner("sample", "--num", "6", "--batch-size", "4")
    return folder
