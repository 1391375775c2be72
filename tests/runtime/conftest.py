"""A tiny model, quantized."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import tiny_config

from qncd_cli.config.loading import parse_config
from qncd_cli.config.schema import Config
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import Artifact


@pytest.fixture(scope="module")
def made(tiny_model) -> tuple[Config, DiffusionModel, Artifact, Artifact]:
    """Configuration, model, its quantized artifact and noise statistics, both sealed."""
    model = load_model(str(tiny_model))
    tree = tiny_config(
        tiny_model,
        sampling__steps=2,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 4, "rounding": "nearest"},
        quantization__activations__observer="minmax",
    )
    config = parse_config(tree, "test")
    result = quantize.run(config, model, *calibrate.run(config, model))
    quantized = artifacts.seal(result.quantized)
    noise_stats = replace(result.noise_stats, parents={"quantized": quantized.digest})
    return config, model, quantized, artifacts.seal(noise_stats)
