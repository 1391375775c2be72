import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from qncd_cli.errors import ModelError
from qncd_cli.models.loading import load_model
from qncd_cli.models.pipelines import ClassConditionalLDMPipeline


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


def _break(folder, what):
    if what == "no index":
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
            json.dumps({**index, "_class_name": "ConsistencyModelPipeline"})
        )


@pytest.mark.parametrize(
    "what",
    ["no index", "component missing", "weights truncated", "index damaged", "other class"],
)
def test_a_broken_folder_is_one_clear_line(tiny_model, tmp_path, what):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    _break(folder, what)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


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
