"""What a folder says of sampling, sizes and few steps: as its pipeline takes it, or one line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import diffusers
import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline
from PIL import Image

from qncd_cli.config import model_card
from qncd_cli.errors import ModelError
from qncd_cli.models.loading import load_model
from qncd_cli.models.schedule import schedule_of
from qncd_cli.models.text import Prompts
from qncd_cli.runtime.denoiser import full_denoiser, guided_predict
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler

# diffusers 0.42 under numpy 2: np.array(tensor); not ours to mend
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_:DeprecationWarning", "ignore:The configuration file of this:FutureWarning"
)

SEEDS, STEPS, TEXTS = [4, 5, 6], 4, ("a red shoe", "a blue bag")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OPTIONS = [
    {},
    *({"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")),
    *({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")),
    {"prediction_type": "v_prediction"},
    {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    {"final_sigmas_type": "sigma_min"},
    {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
]
OTHERS = ("Flow", "CMStochastic")  # rectified flows; consistency models: tests/sampling
SCHEDULERS = sorted(kind for kind in model_card._SCHEDULERS if not kind.startswith(OTHERS))


def taking(kind):
    takes = inspect.signature(getattr(diffusers, kind)).parameters
    return [options for options in OPTIONS if options.keys() <= takes.keys()]


def drawn(model, scheduler, steps, guidance):
    """Latents of SEEDS as qncd samples them at full precision."""
    predict = guided_predict(model, full_denoiser(model), model.labels(SEEDS, "all"), guidance)
    made = make_scheduler(scheduler, model.scheduler_config)
    return denoise(predict, made, steps, generators_for(SEEDS), model.latent_shape)


def expected(pipeline, steps, guidance, **options):
    """The same as the pipeline draws them."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [TEXTS[seed % 2] for seed in SEEDS],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators_for(SEEDS),
        output_type="latent",
        **options,
    ).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = tiny.save(name, tmp_path_factory.mktemp("pipeline") / "model")
        return made[name]

    return of


# ---- the folder's scheduler ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(folder):
    source = folder("StableDiffusionPipeline")
    model = load_model(str(source), prompts=Prompts(TEXTS))
    return model, DiffusionPipeline.from_pretrained(source).components


@pytest.mark.parametrize(
    ("kind", "options"), [(kind, options) for kind in SCHEDULERS for options in taking(kind)]
)
def test_the_folders_scheduler_is_taken_with_all_its_settings(loaded, kind, options):
    """A default that the pipeline puts right (steps_offset) is no default any more."""
    model, components = loaded
    own = getattr(diffusers, kind)(**SD, **options)
    components = {**components, "scheduler": own}
    pipeline = diffusers.StableDiffusionPipeline(**components, requires_safety_checker=False)
    config = schedule_of(pipeline)
    model = dataclasses.replace(model, scheduler_config=config)
    found = drawn(model, model_card._short(kind, config), STEPS, 2.5)
    wanted = expected(pipeline, STEPS, 2.5)
    torch.testing.assert_close(found / wanted.std(), wanted / wanted.std(), rtol=1e-4, atol=1e-4)


def test_an_unknown_sigma_schedule_is_one_line(tmp_path):
    source = tiny.save("StableDiffusionPipeline", tmp_path / "model")
    path = source / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_cosine_sigmas": True}))
    work = Qncd(tmp_path)
    work.write_config(tiny_config(source, sampling__prompts=list(TEXTS)))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 3
    assert "use_cosine_sigmas, an unknown sigma schedule" in refused.stderr
    assert len(refused.stderr.partition("Error: ")[2].strip().splitlines()) == 1


# ---- few steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.0, 8.5])
@pytest.mark.parametrize("name", tiny.FEW_STEPS)
def test_a_model_of_few_steps_is_sampled_as_its_own_pipeline_does(folder, name, guidance):
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, guidance_scale=guidance))
    scheduler = model_card.card_of(str(folder(name))).scheduler
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    for steps in (1, 2, 4, 8):
        wanted = expected(pipeline, steps, guidance)
        found = drawn(model, scheduler, steps, guidance)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_scale_that_is_read_changes_the_image_and_takes_no_negative(folder):
    source = str(folder("LatentConsistencyModelPipeline"))
    one, other = (
        drawn(load_model(source, prompts=Prompts(TEXTS, guidance_scale=s)), "lcm", 2, s)
        for s in (1.0, 8.5)
    )
    assert not torch.equal(one, other)
    assert not load_model(source, prompts=Prompts(TEXTS, guidance_scale=8.5)).guides(8.5)
    with pytest.raises(ModelError, match="reads the guidance scale.*leave negative_prompt out"):
        load_model(source, prompts=Prompts(TEXTS, "bag"))


@pytest.mark.parametrize("name", tiny.FEW_STEPS)
def test_steps_and_guidance_of_few_step_folders(folder, name):
    """The pipelines' own defaults would take 50 steps of the distilled."""
    card = model_card.card_of(str(folder(name)))
    assert (card.scheduler, card.steps, card.guidance_scale) == {
        "LatentConsistencyModelPipeline": ("lcm", 4, 8.5),
        "StableDiffusionPipeline, TCD": ("tcd", 4, 1.0),
        "StableDiffusionXLPipeline, LCM": ("lcm", 4, 5.0),
        "StableDiffusionXLPipeline, Turbo": ("euler-ancestral", 50, 5.0),  # a note says it
    }[name]


def stages(tmp_path, source, **sampling):
    """Coverage and manifest of what calibrate, quantize and sample made, as the plan foresaw."""
    few = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    work = Qncd(tmp_path)
    tree = tiny_config(source, calibration=few)
    tree["quantization"] = {"preset": "best"}
    tree["correction"] = {"inter": {"method": "none"}}
    tree["sampling"] = {"prompts": list(TEXTS), **sampling}
    work.write_config(tree)
    plan = work("calibrate", "--config", "tiny.yaml", "--plan", "--json").data["coverage"]
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "2")
    work("eval")
    run = tmp_path / "runs" / "tiny"
    coverage = json.loads((run / "coverage.json").read_text())
    for key in ("macs", "integer_macs_share"):
        assert coverage[key] == plan[key]
    named = [[(row["name"], row["macs"]) for row in c["layers"]] for c in (coverage, plan)]
    assert named[0] == named[1]
    assert coverage["integer_macs_share"] > 0.9
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["fidelity"]["psnr_db"] > 15
    return coverage, json.loads((run / "samples/quantized/manifest.json").read_text())


@pytest.mark.parametrize("name", tiny.FEW_STEPS)
def test_four_stages_of_few_steps(folder, name, tmp_path):
    turbo = {"steps": 1, "guidance_scale": 0.0} if name.endswith("Turbo") else {}
    coverage, manifest = stages(tmp_path, folder(name), **turbo)
    read = [row for row in coverage["layers"] if row["name"] == "time_embedding.cond_proj"]
    assert all(row["integer"] for row in read)
    assert len(read) == ("L" in name.split("Pipeline")[1] or name.startswith("Latent"))
    assert manifest["sampling"]["steps"] == turbo.get("steps", 4)


# ---- sizes --------------------------------------------------------------------------------------

SIDES = (16, 24)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_height_and_width_are_the_pipelines(folder, name):
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, image_size=(24, 40)))
    assert model.latent_shape == (4, 12, 20)
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    wanted = expected(pipeline, STEPS, 2.5, height=24, width=40)
    torch.testing.assert_close(drawn(model, "ddim", STEPS, 2.5), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [SIDES, (32, 8)])
@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "PixArtSigmaPipeline"])
def test_transformers_take_sizes_that_are_not_square(folder, name, sides):
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, image_size=sides))
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    more = {"use_resolution_binning": False} if name.startswith("PixArt") else {}
    scheduler = model_card.card_of(str(folder(name))).scheduler
    wanted = expected(pipeline, STEPS, 2.5, height=sides[0], width=sides[1], **more)
    torch.testing.assert_close(drawn(model, scheduler, STEPS, 2.5), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [SIDES, (32, 8)])
@pytest.mark.parametrize("name", tiny.FLUX)
def test_tokens_of_a_flux_image_that_is_not_square_keep_their_places(folder, name, sides):
    """8 x 2 tokens are as many as 4 x 4."""
    scale = 3.0 if name.endswith("dev") else 1.0
    request = Prompts(TEXTS, image_size=sides, guidance_scale=scale)
    model = load_model(str(folder(name)), prompts=request)
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    wanted = expected(pipeline, STEPS, scale, height=sides[0], width=sides[1])
    wanted = pipeline._unpack_latents(wanted, *sides, pipeline.vae_scale_factor)
    found = drawn(model, "flow-euler", STEPS, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline, schnell",
    ],
)
def test_four_stages_of_a_size_that_is_not_square(folder, name, tmp_path):
    guidance = 1.0 if name in tiny.FLUX else 2.0
    size = {"height": SIDES[0], "width": SIDES[1], "steps": 2, "guidance_scale": guidance}
    _, manifest = stages(tmp_path, folder(name), **size)
    assert (manifest["sampling"]["height"], manifest["sampling"]["width"]) == SIDES
    with Image.open(tmp_path / "runs/tiny/samples/quantized/000000.png") as image:
        assert image.size == SIDES[::-1]


@pytest.mark.parametrize(
    ("sampling", "code", "said"),
    [
        ({"height": 32}, 3, "height and width belong together"),
        ({"height": 32, "width": 32, "image_size": 32}, 3, "image_size is height and width"),
        ({"height": 32, "width": 33}, 5, "32 x 33 pixels do not fit.*use multiples of 2"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(folder, tmp_path, sampling, code, said):
    work = Qncd(tmp_path)
    tree = tiny_config(folder("StableDiffusionPipeline"))
    tree["sampling"] |= {"prompts": list(TEXTS), **sampling}
    work.write_config(tree)
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == code
    assert re.search(said, refused.stderr)
    assert len(refused.stderr.partition("Error: ")[2].strip().splitlines()) == 1
