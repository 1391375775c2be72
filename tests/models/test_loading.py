import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from qncd_cli.errors import ModelError
from qncd_cli.models.loading import load_model
from qncd_cli.models.pipelines import (
    ClassConditionalDiTPipeline,
    ClassConditionalLDMPipeline,
    ClassConditionalPixelPipeline,
)
from qncd_cli.models.random_models import RANDOM
from qncd_cli.runtime.denoiser import full_denoiser, guided_predict
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler


def test_labels_go_round_the_classes_by_seed(tiny_model):
    model = load_model(str(tiny_model))
    assert model.labels([0, 1, 5, 6], "all").tolist() == [0, 1, 1, 2]
    assert model.labels([0, 1, 2], (3, 1)).tolist() == [3, 1, 3]
    with pytest.raises(ModelError, match="class 4 is out of range"):
        model.labels([0], (4,))


def test_the_pipeline_class_is_what_the_stages_compute(tiny_model):
    """Called as a pipeline with the same seed, guidance and steps: the same image."""
    from qncd_cli.sampling.guidance import guided
    from qncd_cli.sampling.noise import generator_for
    from qncd_cli.sampling.samplers import denoise, make_scheduler

    model = load_model(str(tiny_model))
    pipeline = ClassConditionalLDMPipeline.from_pretrained(tiny_model, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline([2], 3.0, 4, torch.Generator().manual_seed(7), output_type="latent").images
    with torch.no_grad():
        predict = guided(
            lambda x, t, condition: model.denoiser(x, t, **condition).sample,
            model.condition(torch.tensor([2])),
            model.null_condition(1),
            3.0,
        )
        scheduler = make_scheduler("ddim", model.scheduler_config)
        ours = denoise(predict, scheduler, 4, [generator_for(7)], model.latent_shape)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_an_unconditional_diffusers_folder_loads(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.num_classes is None
    assert model.null_condition is None
    assert model.decode(torch.zeros(2, 3, 8, 8)).dtype == torch.uint8
    with pytest.raises(ModelError, match="unconditional"):
        model.labels([0], (1,))


def test_dtype_is_that_of_what_stays_unquantized(tiny_model):
    model = load_model(str(tiny_model), "bfloat16")
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}


def test_digest_follows_the_weights_and_nothing_else(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "training.json").write_text("{}")
    assert load_model(str(copy)).digest == load_model(str(tiny_model)).digest
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_model(str(copy)).digest != load_model(str(tiny_model)).digest


def _rename(folder, old, new):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[new] = tensors.pop(old)
    save_file(tensors, path, metadata={"format": "pt"})


def _break(folder, what):
    if what == "tensor renamed":
        _rename(folder, "conv_in.bias", "conv_in.bais")
    elif what == "tensor added":
        save = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(save)
        save_file({**tensors, "extra": torch.zeros(1)}, save, metadata={"format": "pt"})
    elif what == "LoRA":
        layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        _rename(folder, f"{layer}.weight", f"{layer}.base_layer.weight")
    elif what == "no index":
        (folder / "model_index.json").unlink()
    elif what == "component missing":
        shutil.rmtree(folder / "vqvae")
    elif what == "weights truncated":
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif what == "index damaged":
        (folder / "model_index.json").write_text("{")
    elif what == "other class":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps({**index, "_class_name": "DanceDiffusionPipeline"})
        )


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no index", "no model_index.json"),
        ("component missing", "cannot be loaded"),
        ("weights truncated", "cannot be loaded"),
        ("index damaged", "model_index.json is damaged"),
        ("other class", "DanceDiffusionPipeline is not supported"),
        ("tensor renamed", "1 of 208 tensors missing (first: conv_in.bias)"),
        ("tensor added", "1 of 208 tensors unexpected (first: extra)"),
        ("LoRA", "holds LoRA weights (first: mid_block"),
    ],
)
def test_a_broken_folder_is_one_clear_line(tiny_model, tmp_path, what, said):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    _break(folder, what)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("source", ["./nowhere", "zoo:fashion-lmd", "no-such-owner/no-such-model"])
def test_a_source_that_is_not_there(source):
    with pytest.raises(ModelError) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_half_precision_weights_are_read_as_float32(tmp_path, tiny_model):
    pipeline = ClassConditionalLDMPipeline.from_pretrained(tiny_model, low_cpu_mem_usage=False)
    pipeline.unet.half()
    pipeline.save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    model = load_model(str(tmp_path / "half"))
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}


# ---- full-size architectures --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"), [("ldm5", "did you mean random:ldm4?"), ("unet", "known: ldm4")]
)
def test_an_unknown_architecture_names_the_nearest(name, hint):
    with pytest.raises(ModelError, match=f"no architecture random:{name}") as caught:
        load_model(f"random:{name}")
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "millions", "null_class", "latent", "image"),
    [
        ("ldm4", 400.9, 1000, (3, 64, 64), (3, 256, 256)),
        ("sd15", 859.5, 16, (4, 64, 64), (3, 512, 512)),
        ("dit-xl", 749.8, 1000, (4, 32, 32), (3, 256, 256)),
    ],
)
def test_a_random_model_has_the_published_shapes(name, millions, null_class, latent, image):
    with torch.device("meta"), torch.no_grad():
        pipeline = RANDOM[name]()
        denoiser, labels = pipeline.denoiser, torch.zeros(2, dtype=torch.int64)
        x = torch.zeros(2, *latent)
        output = denoiser(x, labels, **pipeline.condition(labels)).sample
        images = pipeline.decode(x[:1])
    parameters = sum(p.numel() for p in denoiser.parameters())
    assert round(parameters / 1e6, 1) == millions
    assert pipeline.null_class == null_class
    assert output.shape == x.shape
    assert images.shape == (1, *image)


def test_random_sd15_attends_to_prompts_of_77_tokens():
    with torch.device("meta"):
        pipeline = RANDOM["sd15"]()
        condition = pipeline.condition(torch.zeros(2, dtype=torch.int64))
    assert condition["encoder_hidden_states"].shape == (2, 77, 768)


# ---- pipelines of other kinds -------------------------------------------------------------------


@pytest.fixture(params=["pixel", "dit"])
def other_model(request) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_model")


def test_a_class_conditional_model_of_another_kind_loads(other_model):
    model = load_model(str(other_model))
    pixel = other_model.name == "pixel"
    assert model.digest == load_model(str(other_model)).digest
    assert model.num_classes == 4
    assert model.latent_shape == ((1, 16, 16) if pixel else (3, 8, 8))
    assert model.condition(torch.tensor([2, 0]))["class_labels"].tolist() == [2, 0]
    assert model.null_condition is not None
    assert model.null_condition(2)["class_labels"].tolist() == [4, 4]
    assert model.labels([0, 5], "all").tolist() == [0, 1]
    with pytest.raises(ModelError, match="class 4 is out of range"):
        model.labels([0], (4,))
    images = model.decode(torch.zeros(2, *model.latent_shape))
    assert (images.shape, images.dtype) == ((2, 1, 16, 16), torch.uint8)
    if pixel:
        assert set(images.flatten().tolist()) == {128}  # half of 255, rounded to even


def test_class_conditional_guidance_is_off_at_one_alone(other_model):
    """CompVis' rule: 0 is the null class, whatever the class."""
    model = load_model(str(other_model))
    assert [model.guides(scale) for scale in (0.0, 0.5, 1.0, 3.0)] == [True, True, False, True]
    x, t = torch.randn(2, *model.latent_shape), torch.tensor(500)
    denoiser = full_denoiser(model)
    of_classes = guided_predict(model, denoiser, torch.tensor([2, 0]), 0.0)(x, t)
    of_null = denoiser(x, t, model.null_condition(2))
    assert torch.allclose(of_classes, of_null, atol=1e-5)


def test_the_other_pipelines_are_what_the_stages_compute(other_model):
    model = load_model(str(other_model))
    kinds = {"pixel": ClassConditionalPixelPipeline, "dit": ClassConditionalDiTPipeline}
    pipeline = kinds[other_model.name].from_pretrained(other_model)
    pipeline.set_progress_bar_config(disable=True)
    seeds, labels = [7, 8, 9], torch.tensor([2, 0, 3])
    theirs = pipeline(labels, 3.0, 3, generators_for(seeds), output_type="latent").images
    predict = guided_predict(model, full_denoiser(model), labels, 3.0)
    scheduler = make_scheduler("ddim", model.scheduler_config)
    ours = denoise(predict, scheduler, 3, generators_for(seeds), model.latent_shape)
    assert torch.allclose(ours, theirs, atol=1e-5)
    images = pipeline(labels, 3.0, 3, generators_for(seeds), output_type="np").images
    decoded = model.decode(ours).permute(0, 2, 3, 1).float() / 255
    assert (decoded - torch.from_numpy(images)).abs().max() < 0.6 / 255
