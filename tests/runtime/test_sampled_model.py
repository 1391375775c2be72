"""Inter corrections in the stages: what is measured for them, and when they are refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.correction import RUNTIME, STEPWISE
from qncd_cli.config.loading import parse_config
from qncd_cli.correction.statistics import NoiseStatistics
from qncd_cli.errors import ConfigError
from qncd_cli.models.loading import load_model
from qncd_cli.runtime.denoiser import guided_predict
from qncd_cli.runtime.sampled_model import SampledModel
from qncd_cli.sampling.levels import plan_steps, with_timesteps
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler
from qncd_cli.stages import calibrate, quantize, sample
from qncd_cli.store import artifacts

STEPS, GUIDANCE = 3, 2.0
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
INTER = {
    "none": {"method": "none"},
    "ptqd": {"method": "ptqd"},
    "affine": {"method": "affine"},
    "runtime alone": {"method": "runtime", "baseline": "none", "interval": 1},
    "runtime": {"method": "runtime", "interval": 1},
    "runtime slope": {"method": "runtime", "interval": 1, "slope": True},
    "runtime part": {"method": "runtime", "interval": 1, "part": 0.5, "slope": True},
}
PREPARED = ["ptqd", "affine", "runtime", "runtime slope", "runtime part"]


def config_for(folder, inter="none", **changes):
    tree = tiny_config(
        folder,
        sampling__steps=STEPS,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 4, "rounding": "nearest"},
        quantization__activations__observer="minmax",
        correction__inter=INTER[inter],
        **changes,
    )
    return parse_config(tree, "test")


def quantized(folder, **scheduler_config):
    """The tiny model with another scheduler configuration, and the quantized one."""
    model = load_model(str(folder))
    model = replace(model, scheduler_config={**model.scheduler_config, **scheduler_config})
    config = config_for(folder)
    calibration, smoothing = calibrate.run(config, model)
    result = quantize.run(config, model, calibration, smoothing, also=(RUNTIME, STEPWISE))
    noise_stats = artifacts.seal(result.noise_stats)
    return model, SampledModel.quantized(model, result.quantized, noise_stats)


@pytest.fixture(scope="module")
def v_model(tiny_model):
    return quantized(tiny_model, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def zero_snr(tiny_model):
    return quantized(tiny_model, prediction_type="v_prediction", **ZERO_SNR)


def request(folder):
    return sample.SampleRequest(folder, [0, 1], 2)


def check(tree, model, sampled):
    sample.check(parse_config(tree, "test"), model, sampled.noise_stats, [0, 1])


def latents(folder, name, tiny_model, model, sampled, **changes):
    config = config_for(tiny_model, name, **changes)
    sample.run(config, model, sampled, request(folder))
    return artifacts.read(folder / "latents.safetensors", "latents").tensors["latents"]


def test_noise_is_measured_in_eps_along_the_quantized_trajectory(v_model):
    model, sampled = v_model
    measured = sampled.noise_stats
    labels = model.labels([0, 1], "all")
    full = guided_predict(model, SampledModel.full_precision(model).denoiser, labels, GUIDANCE)
    simulated = guided_predict(model, sampled.denoiser, labels, GUIDANCE)
    scheduler = make_scheduler("ddim", model.scheduler_config)
    abar = [step.abar_t for step in plan_steps(with_timesteps(scheduler, STEPS))]
    seeds = generators_for(config_seeds(model))
    expected, q_of_v = NoiseStatistics(), NoiseStatistics()

    def record(i, t, x, v_q):
        v = full(x, t)
        eps, eps_q = (math.sqrt(abar[i]) * p + math.sqrt(1 - abar[i]) * x for p in (v, v_q))
        expected.update(t, eps, eps_q)
        q_of_v.update(t, v, v_q)

    denoise(simulated, scheduler, STEPS, seeds, model.latent_shape, on_step=record)
    for name, tensor in expected.finish().items():
        assert torch.allclose(measured.tensors[name], tensor, rtol=1e-4, atol=1e-6), name
    other = q_of_v.finish()["variance"]
    assert not torch.allclose(measured.tensors["variance"], other, rtol=0.05)
    assert measured.tensors["runtime_slope"].shape == (STEPS,)
    assert measured.body["steps"] == STEPS and "refused" not in measured.body


def config_seeds(model):
    first = config_for(model.source).calibration.seed
    return [first, first + 1]


@pytest.mark.parametrize("name", [n for n in INTER if n != "none"])
def test_every_correction_samples_a_v_model(tmp_path, tiny_model, v_model, name):
    plain = latents(tmp_path / "none", "none", tiny_model, *v_model)
    corrected = latents(tmp_path / "other", name, tiny_model, *v_model)
    assert torch.isfinite(corrected).all()
    statistics = v_model[1].noise_stats.tensors
    believed = {  # of these, only what is believed can change anything; no estimate at the last
        "runtime": ["runtime_channel_gain"],
        "runtime slope": ["runtime_channel_gain", "runtime_slope_gain"],
        "runtime part": ["runtime_channel_gain", "runtime_slope_gain"],
    }.get(name, ["variance"])
    changed = any(bool(statistics[key][:-1].any()) for key in believed)
    assert torch.equal(corrected, plain) != changed


@pytest.mark.parametrize(
    "change",
    [
        {"sampling__steps": 2},
        {"sampling__eta": 0.5},
        {"sampling__guidance_scale": 1.5},
        {"sampling__scheduler": "euler"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("name", PREPARED)
def test_a_correction_prepared_for_other_sampling_is_refused(
    tmp_path, tiny_model, v_model, name, change
):
    tree = config_for(tiny_model, name).to_dict()
    key, value = next(iter(change.items()))
    tree["sampling"][key.removeprefix("sampling__")] = value
    config = parse_config(tree, "test")
    with pytest.raises(ConfigError, match="prepared for other sampling") as refused:
        sample.run(config, *v_model, request(tmp_path / "set"))
    assert "\n" not in str(refused.value) and "repeat" in refused.value.hint
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["runtime", "runtime slope"])
def test_a_baseline_of_the_other_target_is_refused(tiny_model, v_model, name):
    tree = config_for(tiny_model, name).to_dict()
    tree["correction"]["inter"]["target"] = "injected"
    with pytest.raises(ConfigError, match="measured for target total, not injected"):
        check(tree, *v_model)


def test_terms_of_another_field_are_refused(tiny_model, v_model):
    tree = config_for(tiny_model, "none").to_dict()
    tree["correction"]["inter"] |= {"method": "stepwise", "field": 2}
    with pytest.raises(ConfigError, match=r"a field of \[8, 8\] values, not \[2, 2\]"):
        check(tree, *v_model)
    tree["correction"]["inter"]["field"] = 8
    check(tree, *v_model)


@pytest.mark.parametrize("name", [*PREPARED, "stepwise"])
def test_a_correction_prepared_for_images_of_another_size_is_refused(tiny_model, v_model, name):
    tree = config_for(tiny_model, "none" if name == "stepwise" else name).to_dict()
    if name == "stepwise":
        tree["correction"]["inter"]["method"] = name
    other = load_model(str(tiny_model), image_size=(24, 16))
    with pytest.raises(ConfigError, match="latents of 8 x 8, now 12 x 8") as refused:
        check(tree, other, v_model[1])
    assert "--inter none" in refused.value.hint
    del v_model[1].noise_stats.body["latent_shape"]  # as statistics made before it was said
    check(tree, other, v_model[1])
    v_model[1].noise_stats.body["latent_shape"] = [3, 8, 8]


def test_a_graph_is_of_one_size(v_model):
    """And one that was made before there were sizes is found again."""
    own = v_model[1]
    assert own.graph_digests == own.digests and own.size is None
    others = [replace(own, size=size).graph_digests for size in ((24, 16), (16, 24))]
    assert len({tuple(found.items()) for found in (own.graph_digests, *others)}) == 3
    assert replace(own, size=(24, 16)).digests == own.digests


def test_a_graph_is_of_one_type_of_floats(v_model):
    model, own = v_model
    halved = replace(model, denoiser=copy.deepcopy(model.denoiser).bfloat16(), dtype=torch.bfloat16)
    full = SampledModel.full_precision(halved)
    for sampled in (full, replace(own, dtype=halved.dtype)):
        assert sampled.graph_digests == {**sampled.digests, "dtype": "torch.bfloat16"}


def test_the_run_time_correction_alone_needs_no_preparation(tiny_model, v_model):
    tree = config_for(tiny_model, "runtime alone").to_dict()
    tree["sampling"] |= {"steps": 2, "eta": 0.5}
    check(tree, *v_model)


@pytest.mark.parametrize("name", [n for n in INTER if n != "none"])
def test_a_schedule_without_signal_is_quantized_but_not_corrected(
    tmp_path, tiny_model, zero_snr, name
):
    assert zero_snr[1].noise_stats.body["refused"].endswith("without any signal (abar = 0)")
    with pytest.raises(ConfigError, match="without any signal"):
        latents(tmp_path / "set", name, tiny_model, *zero_snr)
    assert not (tmp_path / "set").exists()


def test_a_schedule_without_signal_is_sampled_uncorrected(tmp_path, tiny_model, zero_snr):
    assert torch.isfinite(latents(tmp_path / "set", "none", tiny_model, *zero_snr)).all()


def test_a_slope_without_a_baseline_is_refused(tiny_model):
    tree = config_for(tiny_model, "runtime alone").to_dict()
    tree["correction"]["inter"]["slope"] = True
    with pytest.raises(ConfigError, match="slope needs baseline full_precision"):
        parse_config(tree, "test")
