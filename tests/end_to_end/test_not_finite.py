"""NaN and infinity, wherever they come from: an error that says where and why, and no image."""

from __future__ import annotations

import shutil

import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, rewrite_latents, save_tiny_pipeline, tiny_config
from safetensors.torch import load_file, save_file

from qncd_cli.config.schema import Config
from qncd_cli.errors import ModelError, NotFinite
from qncd_cli.models.first_stage import to_uint8
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Encoded, Prompts, check_encoded
from qncd_cli.runtime.sampled_model import SampledModel
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler
from qncd_cli.stages import pipeline, sample
from qncd_cli.store.run_dir import RunDir

NAN, INF = float("nan"), float("inf")


def put(path, name, value):
    """One number of a stored tensor becomes the value."""
    tensors = load_file(path)
    tensors[name].flatten()[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def work(tmp_path):
    """The command line beside a copy of the tiny model in `model`."""
    save_tiny_pipeline(tmp_path / "model")
    runner = Qncd(tmp_path)
    runner.write_config(tiny_config(tmp_path / "model"))
    return runner


@pytest.mark.parametrize(
    ("part", "tensor", "value"),
    [
        ("unet", "conv_in.weight", NAN),
        ("vqvae", "decoder.conv_out.bias", NAN),
        ("vqvae", "post_quant_conv.weight", INF),
        ("class_embedder", "embedding.weight", -INF),
    ],
)
def test_weights_are_looked_at_while_loading(work, part, tensor, value):
    put(work.folder / "model" / part / "diffusion_pytorch_model.safetensors", tensor, value)
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5
    assert f"{part}: tensor {tensor} is not finite" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_weights_of_text_encoders_are_looked_at(tmp_path):
    folder = tiny.save("StableDiffusionPipeline", tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    name = next(n for n in load_file(path) if n.endswith("final_layer_norm.bias"))
    put(path, name, NAN)
    with pytest.raises(ModelError, match="text_encoder: tensor .*final_layer_norm.bias"):
        load_model(str(folder), prompts=Prompts(("a",)))


def test_weights_too_large_for_float16_say_so(work):
    put(work.folder / "model/unet/diffusion_pytorch_model.safetensors", "conv_in.bias", 1e6)
    load_model(str(work.folder / "model"))
    with pytest.raises(ModelError, match="conv_in.bias is not finite.*bfloat16 or float32"):
        load_model(str(work.folder / "model"), "float16")


def test_encoded_prompts_are_looked_at():
    table = {"encoder_hidden_states": torch.zeros(3, 2, 4)}
    table["encoder_hidden_states"][1, 1, 1] = INF
    with pytest.raises(ModelError, match="prompt 1 is encoded into encoder_hidden_states"):
        check_encoded(Encoded(table, None), "x")
    with pytest.raises(ModelError, match="negative prompt"):
        check_encoded(Encoded({}, table), "x")


# ---- while sampling -----------------------------------------------------------------------------


def calibrated(model, tmp_path, **changes):
    config = Config.model_validate(tiny_config(model.source, **changes))
    return pipeline.calibrate(RunDir(tmp_path / "run"), config, model)


def overflowing(folder, dtype):
    """A model whose first layer gives up to a million: more than float16 holds."""
    model = load_model(str(folder), dtype)
    model.denoiser.conv_in.weight.fill_(3e4)
    return model


@pytest.mark.parametrize("split", [False, True])
def test_calibration_names_layer_timestep_and_float16(tiny_model, tmp_path, split):
    """Wherever it is seen first: splitting looks at layers' inputs before there are ranges."""
    said = r"the input of layer \S+ is not finite at timestep 7.*: float16 ends at 65504 \(set"
    with pytest.raises(ModelError, match=said) as caught:
        calibrated(
            overflowing(tiny_model, "float16"),
            tmp_path,
            model__dtype="float16",
            quantization__split_skip_connections=split,
            correction__intra="none",
        )
    assert caught.value.exit_code == 5
    assert not (tmp_path / "run" / "calibration.safetensors").exists()
    assert calibrated(overflowing(tiny_model, "float32"), tmp_path)[2] is False


def test_calibration_names_the_weight(tiny_model, tmp_path):
    model = load_model(str(tiny_model))
    model.denoiser.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = NAN
    with pytest.raises(ModelError, match="mid_block.resnets.0.conv1.weight of the weights is not"):
        calibrated(model, tmp_path)


def test_sampling_names_step_and_seed_and_writes_no_image(tiny_model, tmp_path):
    model = overflowing(tiny_model, "float16")
    config = Config.model_validate(tiny_config(tiny_model, model__dtype="float16"))
    request = sample.SampleRequest(tmp_path / "set", [7, 8], 2)
    said = "prediction is not finite at step 1 .timestep 751. for seeds 7, 8: float16 ends"
    with pytest.raises(ModelError, match=said):
        sample.run(config, model, SampledModel.full_precision(model), request)
    assert not list(tmp_path.rglob("*.png"))


def test_one_sample_of_many_is_named():
    def predict(x, t):
        return torch.stack([torch.full_like(x[0], NAN if i == 1 else 0) for i in range(len(x))])

    scheduler = make_scheduler("ddim", {"clip_sample": False})
    draw = (predict, scheduler, 3, generators_for([5, 6, 7]), (1, 4, 4))
    with pytest.raises(NotFinite, match="at step 1 .*for seed 6$") as one:
        denoise(*draw, seeds=[5, 6, 7])
    assert one.value.seeds == (6,)
    with pytest.raises(NotFinite, match="for sample 1$"):
        denoise(*draw)


@pytest.mark.parametrize(
    ("name", "kind"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")]
)
def test_a_scheduler_that_breaks_finite_predictions_is_named(name, kind):
    scheduler = make_scheduler(name, {"clip_sample": False})
    draw = (generators_for([3]), (1, 4, 4))
    with pytest.raises(NotFinite, match=f"{kind} makes latents not finite at step .*seed 3") as no:
        denoise(lambda x, t: torch.full_like(x, 3e38), scheduler, 3, *draw, seeds=[3])
    assert "the predictions were finite" in no.value.hint


def test_a_decoder_that_overflows_makes_no_black_image(work):
    path = work.folder / "model" / "vqvae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"].fill_(3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    refused = work("sample", "--num", "2", ok=False)
    assert refused.exit_code == 5
    assert "2 of 2 decoded images are not finite" in refused.stderr
    assert not list(work.folder.rglob("*.png"))


def test_decoded_values_beyond_the_range_are_clipped_as_ever():
    assert to_uint8(torch.tensor([[[[-9.0, 9.0]]]])).tolist() == [[[[0, 255]]]]


def test_eval_takes_no_set_of_nan_for_identical(sampled, tmp_path):
    work = Qncd(tmp_path / "copy")
    shutil.copytree(sampled, work.folder)
    folder = next(work.folder.glob("runs/*/samples/quantized"))
    path = folder / "latents.safetensors"
    from qncd_cli.store import artifacts

    drawn = artifacts.read(path, "latents")
    latents = drawn.tensors["latents"].clone()
    latents[2, 0, 0, 0] = NAN
    rewrite_latents(folder, latents=latents)
    refused = work("eval", ok=False)
    assert refused.exit_code == 4
    assert "the latents of seed 2 are not finite" in refused.stderr
    rewrite_latents(folder, latents=drawn.tensors["latents"])
    from PIL import Image

    for image in folder.glob("*.png"):
        with Image.open(image) as drawn_image:
            size = drawn_image.size
        Image.new("L", size).save(image)
    refused = work("eval", ok=False)
    assert refused.exit_code == 4
    assert "every image is black" in refused.stderr
