"""Pipelines that begin from images: image to image, inpainting, SDXL's refiner."""

from __future__ import annotations

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
from qncd_cli.config.schema import Config
from qncd_cli.models.loading import load_model
from qncd_cli.models.start_images import StartImages
from qncd_cli.models.text import Prompts
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import make_scheduler

SEEDS, STEPS, TEXTS = [4, 5, 6, 7], 5, ("a red shoe", "a blue bag")
PAINTING = [name for name in tiny.IMAGES if "Inpaint" in name]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images and their masks, of the size of the models."""
    folder = tmp_path_factory.mktemp("images")
    draws = torch.Generator().manual_seed(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(2):
        small = torch.randint(0, 256, (4, 4, 3), generator=draws, dtype=torch.uint8)
        image = Image.fromarray(small.numpy()).resize((16, 16))
        image.save(folder / "images" / f"{number}.png")
        mask = torch.zeros(16, 16, dtype=torch.uint8)
        mask[4 * number : 8 + 4 * number, 2:10] = 255
        Image.fromarray(mask.numpy()).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = tiny.save(name, tmp_path_factory.mktemp("pipeline") / "model")
        return made[name]

    return of


def inputs(files, name):
    """Images and masks of a pipeline by that name, as files."""
    parts = ("images", "masks") if name in PAINTING else ("images",)
    return {part: tuple(str(files / part / f"{n}.png") for n in range(2)) for part in parts}


def configured(files, name, **sampling):
    of_files = inputs(files, name)
    own = {"prompts": list(TEXTS), "steps": STEPS, "guidance_scale": 2.5}
    tree = {"model": {"source": "x"}, "sampling": {**own, **of_files, **sampling}}
    return Config.model_validate(tree)


def loaded(folder, files, name, negative=""):
    of_files = inputs(files, name)
    images = StartImages(of_files["images"], of_files.get("masks", ()))
    return load_model(str(folder(name)), prompts=Prompts(TEXTS, negative, images=images))


def opened(path):
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++", "euler-ancestral", "heun"])
@pytest.mark.parametrize("name", tiny.IMAGES)
def test_an_image_is_begun_from_as_its_own_pipeline_does(folder, files, name, scheduler):
    """For the same noise; the encoder's mean, where the pipeline draws with a variance of zero."""
    negative = "red" if scheduler == "euler" else ""
    model = loaded(folder, files, name, negative)
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.scheduler = make_scheduler(scheduler, model.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    of_files = inputs(files, name)
    shown = {part: [opened(paths[s % 2]) for s in SEEDS] for part, paths in of_files.items()}
    latents = model.start(torch.tensor([seed % 2 for seed in SEEDS]))
    options = {"image": latents}
    if "masks" in shown:
        options = {"image": shown["images"], "mask_image": shown["masks"]}
        options |= {"height": 16, "width": 16}
        whole = pipeline.image_processor.preprocess(shown["images"], height=16, width=16)
        encode = pipeline._encode_vae_image
        # of an image it would draw from the encoder before it draws the noise
        pipeline._encode_vae_image = lambda image, generator: (
            latents if torch.equal(image, whole) else encode(image, None)
        )
    for strength in (0.4, 0.8, 1.0):
        config = configured(files, name, strength=strength, scheduler=scheduler)
        found = trajectory.draw(config, model, full_denoiser(model), SEEDS)
        expected = pipeline(
            [TEXTS[seed % 2] for seed in SEEDS],
            negative_prompt=[negative] * len(SEEDS) if negative else None,
            num_inference_steps=STEPS,
            guidance_scale=2.5,
            strength=strength,
            generator=generators_for(SEEDS),
            output_type="latent",
            **options,
        ).images
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*tiny.IMAGES, "StableDiffusionPipeline"])
def test_four_stages_from_images(folder, files, name, tmp_path):
    few = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    work = Qncd(tmp_path)
    tree = tiny_config(folder(name), calibration=few)
    tree["quantization"] = {"preset": "best"}
    tree["correction"] = {"inter": {"method": "none"}}
    parts = ("images", "masks") if name in PAINTING else ("images",)
    named = {part: str(files / part) for part in parts}
    tree["sampling"] = {"prompts": ["a red shoe"], "steps": 4, **named}
    if name.startswith("StableDiffusionXLImg"):
        tree["sampling"]["strength"] = 0.5
    work.write_config(tree)
    plan = work("calibrate", "--config", "tiny.yaml", "--plan", "--json").data
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "2")
    work("eval")
    run = tmp_path / "runs" / "tiny"
    coverage = json.loads((run / "coverage.json").read_text())
    assert coverage["macs"] == plan["coverage"]["macs"]
    assert coverage["integer_macs_share"] == plan["coverage"]["integer_macs_share"] > 0.9
    written = sum((run / f"{n}.safetensors").stat().st_size for n in ("calibration", "smoothing"))
    left = plan["stages"][0]["disk_bytes"] - plan["stages"][0]["partial_bytes"]
    assert left == pytest.approx(written, rel=0.02)
    manifest = json.loads((run / "samples/quantized/manifest.json").read_text())
    default = {"StableDiffusionXLImg2ImgPipeline": 0.5}.get(name, model_card.STRENGTHS.get(name))
    assert manifest["sampling"]["strength"] == default
    assert manifest["sampling"]["prompts"] == ["a red shoe"] * 2  # one for each image
    assert json.loads((run / "metrics.json").read_text())["fidelity"]["psnr_db"] > 15


def test_a_set_from_other_images_is_another(folder, files, tmp_path):
    """And a file that was changed is not taken for the one that was there."""
    name = "StableDiffusionImg2ImgPipeline"
    few = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    work = Qncd(tmp_path)
    tree = tiny_config(folder(name), calibration=few, correction__inter__method="none")
    mine = tmp_path / "mine.png"
    opened(files / "images" / "0.png").save(mine)
    tree["sampling"] |= {"prompts": ["a"], "images": "mine.png", "strength": 0.5}
    work.write_config(tree)
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "1")
    other = str(files / "images" / "1.png")
    refused = work("sample", "--num", "1", "--image", other, ok=False)
    assert refused.exit_code == 4 and "inputs" in refused.stderr
    work("sample", "--num", "1", "--image", other, "--strength", "1.0", "--name", "other")
    sets = [tmp_path / "runs/tiny/samples" / n / "000000.png" for n in ("quantized", "other")]
    assert sets[0].read_bytes() != sets[1].read_bytes()
    opened(files / "images" / "1.png").save(mine)
    refused = work("sample", "--num", "2", ok=False)
    assert refused.exit_code == 3 and "a file was changed" in refused.stderr


@pytest.mark.parametrize(
    ("name", "sampling", "code", "said"),
    [
        ("StableDiffusionImg2ImgPipeline", {}, 5, "begins from images.*set sampling.images"),
        ("StableDiffusionInpaintPipeline", {"images": "I"}, 5, "needs masks"),
        ("StableDiffusionImg2ImgPipeline", {"images": "I", "masks": "M"}, 5, "takes no masks"),
        ("StableDiffusionInpaintPipeline", {"images": "I", "masks": "small"}, 5, "8 x 8 pixels, b"),
        ("StableDiffusionInpaintPipeline", {"images": "I", "masks": "turned"}, 5, "8 x 32 pixels"),
        (
            "StableDiffusionXLInpaintPipeline",
            {"images": "I", "masks": "second"},
            5,
            r"small.png: a mask of 8 x 8 pixels, but \S+1.png has 16 x 16 .give a mask",
        ),
        ("StableDiffusionInpaintPipeline", {"images": "I", "masks": "3"}, 3, "3 masks for 2 im"),
        ("StableDiffusionImg2ImgPipeline", {"images": "wide"}, 5, "16 x 8.*another shape"),
        ("StableDiffusionImg2ImgPipeline", {"images": "text"}, 5, "is no image that can be read"),
        ("StableDiffusionImg2ImgPipeline", {"images": "none"}, 3, "no file or folder none"),
        ("StableDiffusionImg2ImgPipeline", {"masks": "M"}, 3, "masks belongs to images"),
        ("StableDiffusionImg2ImgPipeline", {"images": "I", "strength": 0.1}, 3, "leaves none"),
        ("PixArtSigmaPipeline", {"images": "I"}, 5, "begins from no images here"),
    ],
)
def test_images_that_do_not_fit_are_one_line(folder, files, tmp_path, name, sampling, code, said):
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    Image.new("RGB", (16, 8)).save(tmp_path / "wide.png")
    Image.new("L", (8, 32)).save(tmp_path / "turned.png")  # as many pixels as the images
    (tmp_path / "text.png").write_text("no image")
    meant = {
        "I": str(files / "images"),
        "M": str(files / "masks"),
        "3": [str(files / "masks" / "0.png")] * 3,
        "second": [str(files / "masks" / "0.png"), "small.png"],
        **{n: f"{n}.png" for n in ("small", "wide", "text", "turned")},
    }
    work = Qncd(tmp_path)
    tree = tiny_config(folder(name), correction__inter__method="none")
    own = {key: meant.get(value, value) for key, value in sampling.items()}
    tree["sampling"] |= {"prompts": ["a"], **own}
    work.write_config(tree)
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == code, refused.stderr
    told = refused.stderr.partition("Error: ")[2].strip()
    assert re.search(said, told) and "\n" not in told
    assert not (tmp_path / "runs/tiny/calibration.safetensors").exists()


def test_a_unet_of_nine_channels_in_another_folder_is_one_line(tmp_path):
    source = tiny.save("StableDiffusionInpaintPipeline", tmp_path / "model")
    index = source / "model_index.json"
    index.write_text(
        index.read_text().replace("StableDiffusionInpaintPipeline", "StableDiffusionPipeline")
    )
    assert diffusers.StableDiffusionPipeline.from_pretrained(source).unet.config.in_channels == 9
    work = Qncd(tmp_path)
    work.write_config(tiny_config(source, sampling__prompts=["a"]))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5
    assert "its U-Net reads 9 channels, not 4" in refused.stderr
