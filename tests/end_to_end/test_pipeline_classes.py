"""Every pipeline class of diffusers that is supported: its own samples, and the four stages."""

from __future__ import annotations

import json

import diffusers_pipelines as tiny
import pytest
import torch
import transformers
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qncd_cli.config.schema import Config
from qncd_cli.errors import ArtifactError, ModelError
from qncd_cli.models.loading import load_model
from qncd_cli.models.prompt_cache import PromptCache
from qncd_cli.models.smoothing_sites import smoothing_sites
from qncd_cli.models.text import Prompts
from qncd_cli.models.topology import (
    attention_sites,
    capture_attention,
    capture_inputs,
    float_attention,
)
from qncd_cli.quant.attention_processors import QuantizedJointAttnProcessor
from qncd_cli.quant.layers import StepState
from qncd_cli.runtime.denoiser import denoiser_costs, full_denoiser, guided_predict
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler
from qncd_cli.spec import ATTENTION_OPERANDS

SEEDS, STEPS, GUIDANCE = [4, 5, 6], 3, 2.5
FLOATS = ("float32", "bfloat16")
TEXTS = ("a red shoe", "a blue bag")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = tiny.save(name, tmp_path_factory.mktemp("pipeline") / "model")
        return made[name]

    return of


def scheduler_of(model):
    return "flow-euler" if model.scheduler_config["_class_name"].startswith("Flow") else "ddim"


def drawn(model, guidance):
    """Latents of SEEDS as qncd samples them at full precision."""
    labels = model.labels(SEEDS, "all")
    scheduler = make_scheduler(scheduler_of(model), model.scheduler_config)
    predict = guided_predict(model, full_denoiser(model), labels, guidance)
    with torch.no_grad():
        return denoise(predict, scheduler, STEPS, generators_for(SEEDS), model.latent_shape)


def noise(model):
    shape = (1, *model.latent_shape)
    return torch.cat([torch.randn(shape, generator=g) for g in generators_for(SEEDS)])


@pytest.mark.parametrize("negative", ["", "red"])
@pytest.mark.parametrize("name", tiny.TEXT)
def test_a_text_model_is_sampled_as_its_own_pipeline_does(folder, name, negative):
    size = 16 if name.startswith("PixArtAlpha") else None  # at its own it has 4,096 tokens
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, negative, image_size=size))
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    texts = [TEXTS[seed % 2] for seed in SEEDS]
    options = {"negative_prompt": [negative] * len(SEEDS)} if negative else {}
    if name.startswith("PixArt"):
        options |= {"use_resolution_binning": False, "height": size, "width": size}
    expected = pipeline(
        texts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise(model),
        output_type="latent",
        **options,
    ).images
    found = drawn(model, GUIDANCE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    vae = pipeline.vae.config
    latents = found / vae.scaling_factor + (vae.shift_factor or 0)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents).sample
    images = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    difference = model.decode(found).int() - images.int()
    assert difference.abs().max() <= 1  # large images are decoded one by one
    other = load_model(str(folder(name)), prompts=Prompts(TEXTS, "bag", image_size=size))
    assert not torch.equal(drawn(other, GUIDANCE), found)
    assert other.digest == model.digest


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", [n for n in tiny.TEXT if "Alpha" not in n and "v" not in n])
def test_up_to_one_guidance_is_off_as_in_diffusers(folder, name, scale):
    """Turbo cards name 0: the prompt alone, in one row a sample."""
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, "bag"))
    assert not model.guides(scale) and model.guides(1.5)
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False} if name.startswith("PixArt") else {}
    expected = pipeline(
        [TEXTS[seed % 2] for seed in SEEDS],
        negative_prompt=["bag"] * len(SEEDS),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise(model),
        output_type="latent",
        **options,
    ).images
    found = drawn(model, scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = load_model(str(folder(name)), prompts=Prompts(TEXTS[::-1], "bag"))
    assert not torch.allclose(drawn(other, scale), found, rtol=1e-3)


def test_guidance_that_a_model_cannot_have_is_off_or_refused(folder):
    """FLUX.1-schnell's card names 0, too."""
    flux = load_model(str(folder("FluxPipeline, schnell")), prompts=Prompts(TEXTS, image_size=16))
    plain = load_model(str(folder("DDIMPipeline")))
    for model in (flux, plain):
        assert torch.equal(drawn(model, 0.0), drawn(model, 1.0))
        with pytest.raises(ModelError, match="no null class to guide away from"):
            drawn(model, 1.5)


@pytest.mark.parametrize("name", tiny.FLUX)
def test_flux_is_sampled_as_its_own_pipeline_does(folder, name):
    scale = 3.5 if name.endswith("dev") else 1.0
    request = Prompts(TEXTS, image_size=16, guidance_scale=scale)
    model = load_model(str(folder(name)), prompts=request)
    assert model.null_condition is None
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    x = noise(model)
    tokens = pipeline._pack_latents(x, *x.shape)
    images = pipeline(
        [TEXTS[seed % 2] for seed in SEEDS],
        height=16,
        width=16,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=tokens,
        output_type="np",
    ).images
    found = model.decode(drawn(model, scale)).permute(0, 2, 3, 1).numpy() / 255
    assert abs(found - images).max() < 0.51 / 255 + 1e-3
    if name.endswith("dev"):  # the scale is read, and the shift follows the size
        other = load_model(str(folder(name)), prompts=Prompts(TEXTS, image_size=16))
        assert not torch.equal(drawn(other, 1.0), drawn(model, scale))
        wide = load_model(str(folder(name)), prompts=Prompts(TEXTS, image_size=32))
        assert wide.latent_shape == (4, 16, 16)
        assert wide.scheduler_config["base_shift"] != model.scheduler_config["base_shift"]


STATISTICS = {
    "latents_mean": [0.3, -0.6, 0.9, 0.2],
    "latents_std": [2.0, 0.5, 1.5, 3.0],
    "shift_factor": 0.4,
    "scaling_factor": 0.7,
}


@pytest.mark.parametrize("name", [*tiny.TEXT, *tiny.FLUX, "DiTPipeline"])
def test_latents_are_decoded_as_the_pipeline_does(tmp_path, name):
    """Playground 2.5 has a mean and a deviation, SD3 a shift; others pass over them."""
    path = tiny.save(name, tmp_path / "model") / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **STATISTICS}))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "np"}
    if name == "DiTPipeline":
        model = load_model(str(tmp_path / "model"))
        expected = pipeline(SEEDS, generator=generators_for(SEEDS), **options).images
    else:
        request = Prompts(TEXTS, image_size=16, guidance_scale=1.0)
        model = load_model(str(tmp_path / "model"), prompts=request)
        x = noise(model)
        if name in tiny.FLUX:
            x = pipeline._pack_latents(x, *x.shape)
        if name.startswith("PixArt"):
            options["use_resolution_binning"] = False
        texts = [TEXTS[seed % 2] for seed in SEEDS]
        expected = pipeline(texts, height=16, width=16, latents=x, **options).images
    images = model.decode(drawn(model, 1.0)).permute(0, 2, 3, 1).numpy() / 255
    assert abs(images - expected).max() < 0.51 / 255 + 1e-3
    assert expected.std() > 0.01  # it is not clipped away


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_the_size_of_images_is_the_pipelines(folder, name):
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, image_size=24))
    assert model.latent_shape == (4, 12, 12)
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [TEXTS[seed % 2] for seed in SEEDS],
        height=24,
        width=24,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise(model),
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn(model, GUIDANCE), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0, GUIDANCE])
def test_dit_is_sampled_as_its_own_pipeline_does(folder, guidance):
    model = load_model(str(folder("DiTPipeline")))
    assert model.num_classes == 1000
    pipeline = DiffusionPipeline.from_pretrained(folder("DiTPipeline"))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        SEEDS,
        guidance_scale=guidance,
        generator=generators_for(SEEDS),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    images = model.decode(drawn(model, guidance)).permute(0, 2, 3, 1).numpy() / 255
    assert abs(images - expected).max() < 0.51 / 255 + 1e-4


STAGED = [*tiny.TEXT, *tiny.FLUX, *tiny.CLASSES, *tiny.UNCONDITIONAL]


@pytest.mark.parametrize("name", STAGED)
def test_four_stages(folder, name, tmp_path):
    guided = name not in tiny.UNCONDITIONAL
    changes = {
        "sampling__steps": 2,
        "sampling__guidance_scale": 2.0 if guided else 1.0,
        "calibration": {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1},
    }
    if name in tiny.FLUX:
        changes |= {
            "sampling__image_size": 16,
            "sampling__guidance_scale": 1.0 + name.endswith("dev"),
        }
    if name.startswith("PixArtAlpha"):
        changes["sampling__image_size"] = 16
    if name in tiny.FLUX or "Diffusion3" in name:
        changes["sampling__scheduler"] = "flow-euler"
    if name in {**tiny.TEXT, **tiny.FLUX}:
        (tmp_path / "prompts.txt").write_text("a red shoe\n\n  a blue bag \n")
        changes["sampling__prompts"] = "prompts.txt"
    work = Qncd(tmp_path)
    work.write_config(tiny_config(folder(name), **changes))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    sampled = work("sample", "--num", "3")
    run = tmp_path / "runs" / "tiny"
    assert len(list((run / "samples/quantized").glob("*.png"))) == 3
    manifest = json.loads((run / "samples/quantized/manifest.json").read_text())
    if name in {**tiny.TEXT, **tiny.FLUX}:
        assert manifest["sampling"]["prompts"] == ["a red shoe", "a blue bag"]
        assert manifest["classes"] == [0, 1, 0]
        work("sample", "--num", "2", "--prompt", "a red bag", "--name", "other")
        text = (run / "samples/other/manifest.json").read_text()
        assert json.loads(text)["sampling"]["prompts"] == ["a red bag"]
        encoded = list((run / "prompts").glob("*.safetensors"))
        assert len(encoded) == 2  # of the configuration, and of this command
    coverage = json.loads((run / "coverage.json").read_text())
    assert not [r for r in coverage["layers"] if "processor" in r["why_not_integer"]]
    assert coverage["integer_macs_share"] > 0.9, sampled.stderr


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("StableDiffusion3Pipeline", 5 + 4 + 3),  # attends twice; both streams; the last block
        ("FluxPipeline, dev", 2 * 4 + 2),
        ("PixArtSigmaPipeline", 2 * 2),
    ],
)
def test_smoothing_sites_are_where_the_embedding_scales(folder, name, kinds):
    """With only a site's scale s left of its projection, layers read LayerNorm(x) * (1 + s)."""
    request = Prompts(TEXTS, image_size=16, guidance_scale=2.0)
    model = load_model(str(folder(name)), prompts=request)
    sites = smoothing_sites(model.denoiser)
    assert len(sites) == kinds
    denoiser, condition = full_denoiser(model), model.condition(torch.tensor([0, 1]))
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    for site in sites:
        projection = model.denoiser.get_submodule(site.projection)
        before = projection.weight.clone(), projection.bias.clone()
        channels = len(projection.bias) // site.parts
        scale = torch.linspace(-0.5, 2, channels)
        projection.weight.zero_()
        projection.bias.zero_()
        projection.bias.view(site.parts, channels)[site.part] = scale
        if site.table is not None:
            model.denoiser.get_parameter(site.table).zero_()
        seen = {}
        with capture_inputs(model.denoiser, list(site.layers), seen.__setitem__):
            denoiser(x, 500.0, condition)
        projection.weight.copy_(before[0])
        projection.bias.copy_(before[1])
        assert len(seen) == len(site.layers)
        for features in seen.values():
            plain = features / (1 + scale)
            assert plain.mean(-1).abs().max() < 1e-4
            torch.testing.assert_close(
                plain.var(-1, correction=0), torch.ones(plain.shape[:2]), atol=1e-2, rtol=0
            )


def test_joint_attention_is_counted_over_text_and_image(folder):
    model = load_model(str(folder("FluxPipeline, dev")), prompts=Prompts(TEXTS, image_size=16))
    config = Config.model_validate({"model": {"source": "x"}, "sampling": {"prompts": TEXTS}})
    costs = {cost.name: cost.macs for cost in denoiser_costs(config, model)}
    tokens = 16 + 512
    products = [macs for name, macs in costs.items() if name.endswith(".query_key")]
    assert products == [tokens * tokens * 16] * 4  # two joint blocks and two single ones


JOINT = ["StableDiffusion3Pipeline", "FluxPipeline, dev"]


def one_call(model):
    """Of the denoiser, on noise."""
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return full_denoiser(model)(x, 500.0, model.condition(torch.tensor([0, 1])))


@pytest.mark.parametrize("name", JOINT)
def test_joint_attention_with_nothing_quantized_is_diffusers_own(folder, name):
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, image_size=16, guidance_scale=2.0))
    expected, sites = one_call(model), attention_sites(model.denoiser)
    assert sites and all(site.joint for site in sites)
    assert float_attention(model.denoiser) == {}
    for site in sites:
        module = model.denoiser.get_submodule(site.name)
        module.set_processor(
            QuantizedJointAttnProcessor({}, 32, 32, StepState(), site.scale, inner=module.processor)
        )
    torch.testing.assert_close(one_call(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", JOINT)
def test_joint_operands_are_seen_as_the_products_take_them(folder, name):
    """Text and image together: from what is seen follows what each module gives."""
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, image_size=16, guidance_scale=2.0))
    sites, seen, read = attention_sites(model.denoiser), {}, {}
    expected = one_call(model)
    before = [model.denoiser.get_submodule(site.name).processor for site in sites]
    modules = {site.name: model.denoiser.get_submodule(site.name) for site in sites}
    outputs = [f"{n}.to_out.0" for n, module in modules.items() if hasattr(module, "to_out")]
    with (
        capture_attention(model.denoiser, sites, seen.__setitem__),
        capture_inputs(model.denoiser, outputs, read.__setitem__),
    ):
        assert torch.equal(one_call(model), expected)
    assert [model.denoiser.get_submodule(site.name).processor for site in sites] == before
    assert set(seen) == {f"{site.name}.{part}" for site in sites for part in ATTENTION_OPERANDS}
    assert read
    for layer, x in read.items():
        site = layer.removesuffix(".to_out.0")
        q, k, v = (
            seen[f"{site}.{part}"].unflatten(-1, (modules[site].heads, -1)).transpose(1, 2)
            for part in ATTENTION_OPERANDS
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = [y[:, : x.shape[1]], y[:, -x.shape[1] :]]  # before the text, or behind it
        assert any(torch.allclose(part, x, atol=1e-5) for part in image)
        if modules[site].added_kv_proj_dim is not None:
            assert y.shape[1] > x.shape[1]


@pytest.mark.parametrize("name", [*tiny.TEXT, *tiny.FLUX])
def test_text_encoders_run_once_per_list_of_prompts(folder, name, tmp_path):
    """The second time they are not even read."""
    cache, request = PromptCache(tmp_path), Prompts(TEXTS, image_size=16)
    first = load_model(str(folder(name)), prompts=request, cache=cache)

    def refuse(*args, **options):
        raise RuntimeError("a text encoder is read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
        patch.setattr(transformers.PreTrainedTokenizerBase, "from_pretrained", refuse)
        with pytest.raises(ModelError, match="is read"):
            load_model(str(folder(name)), prompts=request)
        second = load_model(str(folder(name)), prompts=request, cache=cache)
    labels = torch.tensor([1, 0])
    for a, b in ((first.condition(labels), second.condition(labels)),) + (
        ((first.null_condition(2), second.null_condition(2)),) if first.null_condition else ()
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    other = cache.path(first.digest, "float32", Prompts(TEXTS[:1], image_size=16))
    assert not other.exists()
    damaged = cache.path(first.digest, "float32", request)
    flipped = load_file(damaged)
    flipped[next(iter(flipped))].neg_()
    with safe_open(damaged, "pt") as file:
        said = file.metadata()
    save_file(flipped, damaged, said)
    with pytest.raises(ArtifactError, match="damaged.*remove the file"):
        load_model(str(folder(name)), prompts=request, cache=cache)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="cannot be read.*remove the file"):
        load_model(str(folder(name)), prompts=request, cache=cache)


def test_the_first_stage_keeps_its_precision(folder):
    """In a bfloat16 model, too: its weights are not even rounded on the way."""
    name = "StableDiffusionXLPipeline"
    exact, half = (load_model(str(folder(name)), d, prompts=Prompts(TEXTS)) for d in FLOATS)
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    latents = torch.randn(2, *exact.latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact.decode(latents), half.decode(latents))


def test_what_a_text_model_cannot_do_is_one_line(folder):
    with pytest.raises(ModelError, match="18 x 18 pixels.*multiples of 4"):
        load_model(str(folder("FluxPipeline, dev")), prompts=Prompts(TEXTS, image_size=18))
    with pytest.raises(ModelError, match="without a negative prompt"):
        load_model(str(folder("FluxPipeline, dev")), prompts=Prompts(TEXTS, "bag"))


def test_prompts_belong_to_text_models_and_files_are_found(folder, tmp_path, tiny_model):
    work = Qncd(tmp_path)
    work.write_config(tiny_config(folder("StableDiffusionPipeline")))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 3
    assert "needs sampling.prompts" in refused.stderr
    missing = work(
        "calibrate", "--config", "tiny.yaml", "--set", "sampling.prompts=no.txt", ok=False
    )
    assert missing.exit_code == 3
    assert "no.txt" in missing.stderr
    work.write_config(tiny_config(tiny_model, sampling__prompts=["a bag"]))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5
    assert "takes no prompts" in refused.stderr


def test_without_transformers_it_says_what_to_install(folder, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "transformers" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    work = Qncd(tmp_path)
    changes = {"sampling__prompts": ["a bag"]}
    work.write_config(tiny_config(folder("StableDiffusionPipeline"), **changes))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5
    assert "pip install transformers" in refused.stderr
