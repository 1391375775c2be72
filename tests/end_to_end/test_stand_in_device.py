"""Stages of a model that is not on the CPU, on a stand-in for a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import tiny_config
from stand_in_device import DEVICE, OnDevice, StandInDevice

from qncd_cli.config.loading import parse_config
from qncd_cli.models.loading import load_model
from qncd_cli.stages import calibrate, quantize


def test_the_device_refuses_what_a_gpu_refuses():
    with StandInDevice():
        x, y = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
        assert isinstance(x, OnDevice) and x.device == DEVICE
        with pytest.raises(RuntimeError, match="same device"):
            x + y
        with pytest.raises(RuntimeError, match="same device"):
            y[torch.zeros(1, dtype=torch.int64, device=DEVICE)]
        assert torch.equal((x + y.to(DEVICE)).cpu(), y + y)
        assert float((x * torch.tensor(2.0)).sum()) == 12
        x[:, 0] = 5
        assert x.cpu()[1].tolist() == [5, 1, 1]


@pytest.fixture(scope="module")
def made(tiny_pixel_model):
    """What calibrate and quantize make of a model on the CPU and of the same model there, in two
    passes: the second one's inputs come from behind weights that were rounded on the CPU."""
    weights = {"bits": 4, "rounding": "gptq", "passes": 2, "asymmetry": 0.5}
    config = parse_config(tiny_config(tiny_pixel_model, quantization__weights=weights), "test")
    found = []
    for place in (torch.device("cpu"), DEVICE):
        model = load_model(str(tiny_pixel_model))
        with StandInDevice():
            model.denoiser.to(place)
            model = dataclasses.replace(model, device=place)
            calibration, smoothing = calibrate.run(config, model)
            result = quantize.run(config, model, calibration, smoothing)
        assert next(model.denoiser.parameters()).device.type == place.type
        found.append((calibration, smoothing, result.quantized, result.noise_stats))
    return found


@pytest.mark.slow
def test_artifacts_are_on_the_cpu_and_those_of_the_cpu(made):
    """To float rounding, which other strides of the same numbers may bring: where two ranges of a
    channel are nearly as good, the search may end at its neighbour."""
    for here, there in zip(*made, strict=True):
        assert here.tensors.keys() == there.tensors.keys()
        assert not any(isinstance(tensor, OnDevice) for tensor in there.tensors.values())
    rows, others = made[0][0].tensors["inputs.x"], made[1][0].tensors["inputs.x"]
    assert torch.allclose(rows, others, atol=1e-4)
    off = []
    for key, scale in made[0][2].tensors.items():
        if key.endswith(("input_scale", "weight_scale")):
            off.append((scale / made[1][2].tensors[key] - 1).abs().flatten())
            assert off[-1].max() < 0.2, key
    assert torch.cat(off).quantile(0.9) < 0.01


@pytest.mark.slow
def test_the_same_seeds_begin_with_the_same_noise(made):
    """Bit by bit: what is drawn is drawn on the CPU, sample by sample."""
    first = []
    for calibration, *_ in made:
        timestep = calibration.tensors["inputs.timestep"]
        first.append(calibration.tensors["inputs.x"][timestep == timestep.max()])
    assert len(first[0]) == 6
    assert torch.equal(*first)
