"""Which folders' schedulers each sampler fits, and step counts that schedulers refuse."""

from __future__ import annotations

import diffusers
import pytest
import torch

from qncd_cli.errors import ConfigError
from qncd_cli.models.zoo import zoo_path
from qncd_cli.sampling import scheduler_classes
from qncd_cli.sampling.levels import with_timesteps
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import SCHEDULERS, denoise, make_scheduler

# diffusers 0.42 under numpy 2: np.array(tensor); not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

DIFFUSION = sorted(set(SCHEDULERS) - {"flow-euler", "consistency"})
NEED_MORE = {"DPMSolverSDEScheduler"}
"""Packages that are not here."""
WITHIN = ("deis", "dpmsolver++", "dpmsolver-singlestep", "sa-solver", "unipc")
"""Samplers that put a thousand steps into timesteps 0 to 999 whatever the offset."""
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def config_of(name, **options):
    """As a pipeline that was loaded has it."""
    return {**getattr(diffusers, name)(**options).config, "_class_name": name}


@pytest.mark.parametrize("own", sorted(scheduler_classes.DIFFUSION - NEED_MORE))
def test_solvers_of_one_schedule_take_each_others_place(own):
    """Betas, prediction and spacing stay those of the folder."""
    config = config_of(own, **SD, prediction_type="v_prediction")
    levels = []
    for name in DIFFUSION:
        made = make_scheduler(name, config)
        assert made.config.prediction_type == "v_prediction"
        levels.append(made.alphas_cumprod)
    assert all(torch.equal(levels[0], other) for other in levels)
    with pytest.raises(ConfigError, match=f"does not fit a model made for {own}"):
        make_scheduler("flow-euler", config)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("LCMScheduler", "distilled.*use lcm"),
        ("TCDScheduler", "distilled.*use tcd"),
        ("FlowMatchLCMScheduler", "distilled.*take the model that it was distilled from"),
        ("EDMEulerScheduler", "noise levels none of qncd's samplers has.*EulerDiscreteScheduler"),
        ("EDMDPMSolverMultistepScheduler", "noise levels"),
        ("CMStochasticIterativeScheduler", "use consistency"),
        ("NobodysScheduler", "noise levels"),
    ],
)
@pytest.mark.parametrize("name", ["ddim", "euler", "flow-euler"])
def test_other_schedules_are_refused_by_name(own, said, name):
    config = config_of(own) if hasattr(diffusers, own) else {**SD, "_class_name": own}
    with pytest.raises(ConfigError, match=f"{name}' does not fit a model made for {own}.*{said}"):
        make_scheduler(name, config)


@pytest.mark.parametrize(
    ("own", "options", "fits", "does_not"),
    [
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "euler", "plms"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "dpmsolver++", "ddim"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0},
            "euler",
            "unipc",
        ),
    ],
)
def test_keys_that_change_the_levels_are_kept_or_refused(own, options, fits, does_not):
    config = config_of(own, **SD, **options)
    made = make_scheduler(fits, config)
    assert all(made.config[key] == value for key, value in options.items())
    key = next(iter(options))
    with pytest.raises(ConfigError, match=f"made for {own} with {key}"):
        make_scheduler(does_not, config)


def test_an_unknown_sigma_schedule_is_one_line():
    """diffusers would pass over it."""
    config = config_of("EulerDiscreteScheduler", **SD) | {"use_cosine_sigmas": True}
    with pytest.raises(ConfigError, match="use_cosine_sigmas, an unknown sigma.*use_karras"):
        make_scheduler("euler", config)
    assert make_scheduler("euler", {**config, "use_cosine_sigmas": False})


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_a_base_model_with_a_distilling_lora_takes_the_few_steps(name):
    made = make_scheduler(name, config_of("DDIMScheduler", **SD))
    assert with_timesteps(made, 4).timesteps.tolist() == [999, 759, 499, 259]
    with pytest.raises(ConfigError, match="takes no 60 steps.*original"):
        with_timesteps(made, 60)


def test_what_never_clipped_does_not_begin_to():
    """DDIM clips unless it is told not to; PNDM's configuration says nothing of it."""
    assert not make_scheduler("ddim", config_of("PNDMScheduler", **SD)).config.clip_sample
    assert make_scheduler("ddim", config_of("DDPMScheduler", **SD)).config.clip_sample


@pytest.mark.parametrize("name", sorted(set(DIFFUSION) - {"lcm", "tcd"}))
def test_as_many_steps_as_there_are_timesteps_work_or_are_refused(name):
    """With an offset of 1 the first of 1,000 steps would be beyond the last timestep."""
    folder = zoo_path("fashion-ldm") / "scheduler"
    config = config_of("DDIMScheduler", **diffusers.DDIMScheduler.load_config(folder))
    assert config["steps_offset"] == 1
    scheduler = make_scheduler(name, {**config, "timestep_spacing": "leading"})
    if name in WITHIN:
        assert float(max(with_timesteps(scheduler, 1000).timesteps)) <= 999
        return
    with pytest.raises(ConfigError, match="1000 steps: the first would be at timestep 1000.*999"):
        with_timesteps(scheduler, 1000)
    assert float(max(with_timesteps(scheduler, 999).timesteps)) <= 999
    without = make_scheduler(name, {**config, "steps_offset": 0, "timestep_spacing": "leading"})
    assert float(max(with_timesteps(without, 1000).timesteps)) == 999


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_work_or_name_scheduler_and_steps(steps):
    for name in DIFFUSION:
        scheduler = make_scheduler(name, config_of("DDIMScheduler", **SD))
        draw = (lambda x, t: x, scheduler, steps, generators_for([0]), (1, 4, 4))
        if name == "pndm":
            with pytest.raises(ConfigError, match=f"PNDMScheduler takes no {steps} steps.*plms"):
                denoise(*draw)
        else:
            assert torch.isfinite(denoise(*draw)).all()


def test_a_scheduler_that_fails_inside_diffusers_is_one_line():
    learned = config_of("DDPMScheduler", **SD, variance_type="learned_range")
    draw = (generators_for([0]), (1, 4, 4))
    with pytest.raises(ConfigError, match="DDPMScheduler fails at step 1 of 4") as caught:
        denoise(lambda x, t: x, make_scheduler("ddpm", learned), 4, *draw)
    assert "\n" not in str(caught.value)
    laplace = config_of("DDPMScheduler", beta_schedule="laplace")
    with pytest.raises(ConfigError, match="PNDMScheduler cannot be made.*laplace"):
        make_scheduler("pndm", laplace)


@pytest.mark.parametrize("steps", [1, 3])
def test_consistency_models_are_sampled_as_diffusers_does(steps):
    """The first timestep, 250 log 80, is beyond the scheduler's 40 training steps."""
    from diffusers import CMStochasticIterativeScheduler

    own = make_scheduler("consistency", config_of("CMStochasticIterativeScheduler"))
    seen = []

    def predict(x, t):
        seen.append(float(t))
        return torch.tanh(x) - 0.1 * x

    latents = denoise(predict, own, steps, generators_for([0, 1]), (1, 4, 4))
    scheduler, generators = CMStochasticIterativeScheduler(), generators_for([0, 1])
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in generators])
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x, generator=generators).prev_sample
    assert torch.equal(latents, x)
    assert seen[0] == pytest.approx(250 * torch.log(torch.tensor(80.0)).item())
    with pytest.raises(ConfigError, match="consistency is for consistency models"):
        make_scheduler("consistency", config_of("DDIMScheduler"))
