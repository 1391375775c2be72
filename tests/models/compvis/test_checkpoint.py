"""CompVis checkpoints against an independent computation in compvis_reference.py."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import full_size_ldm4
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from compvis_reference import LatentDiffusion
from conftest import tiny_config
from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor

from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ModelError
from qncd_cli.models.compvis.checkpoint import compvis_pipeline, unet_class
from qncd_cli.models.compvis.config import first_stage_options, read_yaml, unet_options
from qncd_cli.models.compvis.keys import ema_key, first_stage_sources, unet_sources
from qncd_cli.models.loading import load_model

from .trees import CIN256_V2, LSUN_BEDS, LSUN_CHURCHES, SMALL, changed

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
UNETS = {
    "lsun_beds256": "UNet2DModel",
    "kl": "UNet2DModel",
    "lsun_churches256": "MultiHeadUNet2DModel",
}
KL = {"kl", "lsun_churches256"}
FIRST_STAGE_BUFFERS = {"first_stage_model.loss.logvar": torch.zeros(())}


def reference(tree: dict[str, Any], seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    return LatentDiffusion(tree).eval().requires_grad_(False)


def write(folder: Path, tree: dict[str, Any], tensors: dict[str, Tensor], **more: Any) -> tuple:
    """A .ckpt as PyTorch Lightning writes it, and its YAML: their paths as text."""
    checkpoint, config = folder / "model.ckpt", folder / "config.yaml"
    torch.save({"epoch": 3, "global_step": 7, "state_dict": tensors, **more}, checkpoint)
    config.write_text(yaml.safe_dump(tree))
    return str(checkpoint), str(config)


@pytest.fixture(scope="module")
def small() -> LatentDiffusion:
    return reference(SMALL["cin256-v2"])


@pytest.fixture
def files(tmp_path, small) -> tuple[str, str]:
    """Checkpoint and YAML of the reduced cin256-v2."""
    return write(tmp_path, SMALL["cin256-v2"], small.state_dict())


def error_of(checkpoint: str, config: str | None) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(checkpoint, compvis_config=config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the same computation ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
def test_denoiser_and_first_stage_compute_what_compvis_computes(kind, tmp_path):
    tree = SMALL[kind]
    theirs = reference(tree)
    tensors = {**theirs.state_dict(), **FIRST_STAGE_BUFFERS}
    if kind in KL:
        tensors["scale_factor"] = torch.tensor(0.25)  # of scale_by_std; beats the YAML's
    checkpoint, config = write(tmp_path, tree, tensors)
    pipeline = compvis_pipeline(checkpoint, config)
    ours = load_model(checkpoint, compvis_config=config)
    assert type(pipeline.unet).__name__ == UNETS.get(kind, "UNet2DConditionModel")
    assert type(pipeline.vqvae) is (AutoencoderKL if kind in KL else VQModel)

    x, t = torch.randn(2, *ours.latent_shape), torch.tensor([3, 977])
    labels = None if ours.num_classes is None else torch.tensor([2, ours.num_classes])
    condition = {} if labels is None else ours.condition(labels)
    with torch.no_grad():
        eps = ours.denoiser(x, t, **condition).sample
        torch.testing.assert_close(eps, theirs.eps(x, t, labels), **TOLERANCE)

        scale = 0.25 if kind in KL else tree["model"]["params"].get("scale_factor", 1.0)
        assert pipeline.vqvae.config.scaling_factor == scale
        image = pipeline.vqvae.decode(x / scale).sample
        expected = theirs.first_stage_model.decode(x / scale)
        torch.testing.assert_close(image, expected, **TOLERANCE)
        pixels = ((expected / 2 + 0.5).clamp(0, 1) * 255).round()
        assert (ours.decode(x).float() - pixels).abs().max() <= 1  # a rounding may fall otherwise

        encoded = pipeline.vqvae.encoder(expected)
        encoded = pipeline.vqvae.quant_conv(encoded)
        torch.testing.assert_close(encoded, theirs.first_stage_model.encode(expected), **TOLERANCE)


def test_the_parts_that_have_no_output_alone(files, small):
    model = load_model(files[0], compvis_config=files[1])
    assert model.num_classes == 4
    assert model.null_condition is not None
    null = model.null_condition(2)["encoder_hidden_states"]
    assert torch.equal(null[1, 0], small.cond_stage_model.embedding.weight[4])
    config = model.scheduler_config
    assert (config["beta_start"], config["beta_end"]) == (0.0015, 0.0195)
    assert config["beta_schedule"] == "scaled_linear"
    assert (config["num_train_timesteps"], config["prediction_type"]) == (1000, "epsilon")
    assert (config["clip_sample"], config["steps_offset"]) == (False, 1)


def test_moving_averages_are_taken_where_there_are_any(tmp_path, small):
    averaged = reference(SMALL["cin256-v2"], seed=1)
    tensors = {**small.state_dict(), **averaged.averages()}
    checkpoint, config = write(tmp_path, SMALL["cin256-v2"], tensors)
    model = load_model(checkpoint, compvis_config=config)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    context = small.cond_stage_model.embedding(torch.tensor([1]))[:, None]
    eps = model.denoiser(x, t, encoder_hidden_states=context).sample
    expected = averaged.model.diffusion_model(x, t, context)
    torch.testing.assert_close(eps, expected, **TOLERANCE)


def test_averages_that_are_not_complete_are_an_error(tmp_path, small):
    averages = small.averages()
    del averages["model_ema.diffusion_modelout2bias"]
    checkpoint, config = write(tmp_path, SMALL["cin256-v2"], {**small.state_dict(), **averages})
    assert "1 tensor missing (model_ema.diffusion_modelout2bias)" in error_of(checkpoint, config)


def test_counters_alone_are_no_averages(tmp_path, small):
    """As in checkpoints that were pruned."""
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(1)}
    checkpoint, config = write(tmp_path, SMALL["cin256-v2"], {**small.state_dict(), **counters})
    weight = load_model(checkpoint, compvis_config=config).denoiser.state_dict()["conv_in.weight"]
    assert torch.equal(weight, small.state_dict()["model.diffusion_model.input_blocks.0.0.weight"])


def test_safetensors_and_half_precision(tmp_path, small):
    tensors = {name: tensor.half() for name, tensor in small.state_dict().items()}
    checkpoint, config = write(tmp_path, SMALL["cin256-v2"], tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = compvis_pipeline(checkpoint, config).unet.state_dict()
    theirs = compvis_pipeline(str(tmp_path / "model.safetensors"), config).unet.state_dict()
    assert {t.dtype for t in ours.values()} == {torch.float16}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = load_model(checkpoint, compvis_config=config)
    assert {p.dtype for p in loaded.denoiser.parameters()} == {torch.float32}


def test_digest_follows_the_checkpoint_and_its_yaml(tmp_path, files):
    before = load_model(files[0], compvis_config=files[1]).digest
    assert load_model(files[0], compvis_config=files[1]).digest == before
    config = Path(files[1])
    config.write_text(config.read_text() + "# a remark\n")
    assert load_model(files[0], compvis_config=files[1]).digest != before


def test_the_configuration_names_the_yaml(files):
    tree = tiny_config(Path(files[0]), model__compvis_config=files[1])
    model = open_model(parse_config(tree, "test"), "cpu")
    assert model.num_classes == 4


# ---- names and shapes as published -------------------------------------------------------------

# From ldm/modules/diffusionmodules/{openaimodel,model}.py, ldm/modules/attention.py,
# ldm/modules/encoders/modules.py and ldm/models/autoencoder.py with cin256-v2.yaml.
PUBLISHED = {
    "model.diffusion_model.time_embed.0.weight": [768, 192],
    "model.diffusion_model.input_blocks.0.0.weight": [192, 3, 3, 3],
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": [192, 192, 3, 3],
    "model.diffusion_model.input_blocks.3.0.op.weight": [192, 192, 3, 3],
    "model.diffusion_model.input_blocks.4.0.emb_layers.1.weight": [384, 768],
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": [384, 192, 1, 1],
    "model.diffusion_model.input_blocks.4.1.proj_in.weight": [384, 384, 1, 1],
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [384, 512],
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.weight": [3072, 384],
    "model.diffusion_model.input_blocks.11.1.transformer_blocks.0.ff.net.2.weight": [960, 3840],
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": [960],
    "model.diffusion_model.output_blocks.0.0.in_layers.2.weight": [960, 1920, 3, 3],
    "model.diffusion_model.output_blocks.2.2.conv.weight": [960, 960, 3, 3],
    "model.diffusion_model.output_blocks.8.2.conv.weight": [384, 384, 3, 3],
    "model.diffusion_model.output_blocks.11.0.out_layers.3.weight": [192, 192, 3, 3],
    "model.diffusion_model.out.2.weight": [3, 192, 3, 3],
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
    "first_stage_model.encoder.down.1.downsample.conv.weight": [256, 256, 3, 3],
    "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    "first_stage_model.decoder.up.2.upsample.conv.weight": [512, 512, 3, 3],
    "first_stage_model.decoder.up.0.block.2.conv2.weight": [128, 128, 3, 3],
    "first_stage_model.decoder.mid.block_2.norm1.weight": [512],
    "first_stage_model.quantize.embedding.weight": [8192, 3],
    "first_stage_model.quant_conv.weight": [3, 3, 1, 1],
    "first_stage_model.post_quant_conv.weight": [3, 3, 1, 1],
    "cond_stage_model.embedding.weight": [1001, 512],
}


def on_meta(tree: dict[str, Any], folder: Path) -> tuple[Any, Any, dict[str, list[int]]]:
    """Modules that the YAML asks for, and names and shapes of CompVis' own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    params = read_yaml(str(path))
    with torch.device("meta"):
        unet, stage = unet_options(params), first_stage_options(params)
        unet = unet_class(unet)(**unet)
        stage = (VQModel if "num_vq_embeddings" in stage else AutoencoderKL)(**stage)
        shapes = {n: list(t.shape) for n, t in LatentDiffusion(tree).state_dict().items()}
    return unet, stage, shapes


def test_cin256_v2_has_the_names_and_shapes_of_the_repository(tmp_path):
    unet, stage, shapes = on_meta(CIN256_V2, tmp_path)
    assert {name: shapes[name] for name in PUBLISHED} == PUBLISHED
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 2) == 400.92
    sources = unet_sources(unet.state_dict(), 2)
    theirs = {k for k in shapes if k.startswith("model.")}
    assert {f"model.diffusion_model.{s.key}" for s in sources.values()} == theirs
    assert len(sources) == len(theirs)
    for name, parameter in unet.state_dict().items():
        stored = shapes[f"model.diffusion_model.{sources[name].key}"]
        assert stored == list(parameter.shape), name
    sources = first_stage_sources(stage.state_dict(), 3)
    theirs = {k for k in shapes if k.startswith("first_stage_model.")}
    assert {f"first_stage_model.{s.key}" for s in sources.values()} == theirs
    assert ema_key("input_blocks.4.1.proj_in.weight") == (
        "model_ema.diffusion_modelinput_blocks41proj_inweight"
    )
    assert len({ema_key(k) for k in theirs}) == len(theirs)


@pytest.mark.parametrize("tree", [LSUN_BEDS, LSUN_CHURCHES], ids=["bedrooms", "churches"])
def test_lsun_has_the_names_and_shapes_of_the_repository(tree, tmp_path):
    unet, stage, shapes = on_meta(tree, tmp_path)
    sources = unet_sources(unet.state_dict(), 2)
    theirs = {k for k in shapes if k.startswith("model.")}
    assert {f"model.diffusion_model.{s.key}" for s in sources.values()} == theirs
    for name, parameter in unet.state_dict().items():
        shape = list(parameter.shape)
        if sources[name].part is not None:
            shape[0] *= 3
        stored = shapes[f"model.diffusion_model.{sources[name].key}"]
        assert stored[: len(shape)] == shape, name
        assert set(stored[len(shape) :]) <= {1}, name
    levels = len(stage.config.block_out_channels)
    sources = first_stage_sources(stage.state_dict(), levels)
    theirs = {k for k in shapes if k.startswith("first_stage_model.")}
    assert {f"first_stage_model.{s.key}" for s in sources.values()} == theirs


def test_the_names_are_those_of_diffusers_own_converters(tmp_path):
    class Name(str):
        shape = ()

    unet, stage, shapes = on_meta(CIN256_V2, tmp_path)
    keys = {name: Name(name) for name in shapes}
    theirs = convert_ldm_unet_checkpoint(keys, unet.config)
    sources = unet_sources(unet.state_dict(), 2)
    assert theirs == {n: f"model.diffusion_model.{s.key}" for n, s in sources.items()}
    theirs = convert_ldm_vae_checkpoint(keys, stage.config)
    sources = first_stage_sources(stage.state_dict(), 3)
    ours = {n: f"first_stage_model.{s.key}" for n, s in sources.items()}
    del ours["quantize.embedding.weight"]  # which they leave out
    assert theirs == ours


# ---- what does not fit ---------------------------------------------------------------------------

CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(CONV), f"1 tensor missing ({CONV})"),
        (
            lambda t: t.update({CONV + "s": t.pop(CONV)}),
            f"1 tensor missing ({CONV}); 1 tensor not known ({CONV}s)",
        ),
        (
            lambda t: t.update({CONV: t[CONV][:, :8]}),
            f"1 tensor of another shape ({CONV} is [32, 8, 3, 3], expected [32, 32, 3, 3])",
        ),
        (lambda t: t.update(extra=torch.zeros(1)), "1 tensor not known (extra)"),
        (
            lambda t: [t.pop(k) for k in list(t) if ".encoder." in k],
            "first_stage_model.encoder.conv_in.bias, ",
        ),
        (lambda t: t.pop("cond_stage_model.embedding.weight"), "cond_stage_model.embedding"),
        (lambda t: t.update(betas=t["betas"] * 1.1), "its noise schedule (betas) is not"),
        (lambda t: t.update({"a.lora_A.weight": torch.zeros(1)}), "merge the adapter"),
        (lambda t: t.update(note="text"), "note is no tensor"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, said, tmp_path, small):
    tensors = dict(small.state_dict())
    change(tensors)
    checkpoint, config = write(tmp_path, SMALL["cin256-v2"], tensors)
    message = error_of(checkpoint, config)
    assert checkpoint in message
    assert said in message


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"model": {"params": {}}}, "model.params has no unet_config"),
        ([1], "the file is not a mapping"),
        ({"model": {"target": "a.B", "params": {}}}, "only LatentDiffusion"),
        (changed(SMALL["cin256-v2"], unet__num_heads="one"), "num_heads: 'one'"),
        (changed(SMALL["cin256-v2"], unet__new_trick=True), "new_trick: True, which is not known"),
        (changed(SMALL["cin256-v2"], dd__tanh_out=True), "tanh_out: True, which is not supported"),
        (changed(SMALL["cin256-v2"], cond__n_classes=...), "null class"),
        (changed(SMALL["cin256-v2"], beta_schedule="cosine"), "beta_schedule: cosine"),
        (changed(SMALL["cin256-v2"], unet__in_channels=6), "concatenation"),
        (changed(SMALL["cin256-v2"], cond__embed_dim=8), "context_dim 16"),
        (changed(SMALL["cin256-v2"], linear_end=0.0155), "noise schedule"),
        (changed(SMALL["cin256-v2"], unet__channel_mult=[1, 2, 4]), "of another shape"),
        (
            changed(
                SMALL["cin256-v2"],
                cond_stage_config={"target": "ldm.modules.encoders.modules.BERTEmbedder"},
            ),
            "is a ldm.modules.encoders.modules.BERTEmbedder",
        ),
    ],
)
def test_a_yaml_that_does_not_fit_is_named(tree, said, files):
    Path(files[1]).write_text(yaml.safe_dump(tree))
    assert said in error_of(*files)


def test_files_that_are_not_there_or_not_readable(tmp_path, files):
    checkpoint, config = files
    assert "the YAML that came with it" in error_of(checkpoint, None)
    assert "cannot be read" in error_of(checkpoint, str(tmp_path / "none.yaml"))
    assert "no such file" in error_of(str(tmp_path / "none.ckpt"), config)
    (tmp_path / "odd.yaml").write_text("a: [")
    assert "is not YAML" in error_of(checkpoint, str(tmp_path / "odd.yaml"))
    for name in ("cut.ckpt", "cut.safetensors"):
        (tmp_path / name).write_bytes(Path(checkpoint).read_bytes()[:5000])
        assert "cannot be read" in error_of(str(tmp_path / name), config)
    (tmp_path / "text.ckpt").write_text("hello")
    assert str(tmp_path / "text.ckpt") in error_of(str(tmp_path / "text.ckpt"), config)


class _Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_not_run(tmp_path, small):
    trap = tmp_path / "trap"
    checkpoint, config = write(
        tmp_path, SMALL["cin256-v2"], small.state_dict(), callbacks=_Code(trap)
    )
    assert "is no pickle of tensors alone" in error_of(checkpoint, config)
    assert not trap.exists()


def test_what_lightning_stores_beside_the_weights_is_passed_over(tmp_path, small, monkeypatch):
    """Old checkpoints name their callbacks by class, and hold numpy scalars."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})  # type: ignore
    with monkeypatch.context() as patched:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patched.setitem(sys.modules, part, module)
        callbacks = {module.ModelCheckpoint: {"best_model_score": np.float64(0.5)}}
        files = write(tmp_path, SMALL["cin256-v2"], small.state_dict(), callbacks=callbacks)
    assert load_model(files[0], compvis_config=files[1]).num_classes == 4


# ---- qncd convert --------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["cin256-v2", "lsun_churches256"])
def test_convert_writes_a_folder_that_loads_to_the_same_model(kind, tmp_path, qncd):
    (tmp_path / "in").mkdir()
    tensors = reference(SMALL[kind]).state_dict()
    checkpoint, config = write(tmp_path / "in", SMALL[kind], tensors)
    arguments = ["convert", checkpoint, "--compvis-config", config, "--out", "made/folder"]
    data = qncd(*arguments, "--json").data
    folder = tmp_path / "made/folder"
    assert data["pipeline"] == json.loads((folder / "model_index.json").read_text())["_class_name"]
    before = load_model(checkpoint, compvis_config=config)
    after = load_model(str(folder))
    assert data["parameters"]["unet"] == sum(p.numel() for p in before.denoiser.parameters())
    theirs, ours = before.denoiser.state_dict(), after.denoiser.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    schedules = [before.scheduler_config, after.scheduler_config]
    public = [{k: v for k, v in s.items() if not k.startswith("_")} for s in schedules]
    assert public[0] == public[1]
    assert (before.num_classes, before.latent_shape) == (after.num_classes, after.latent_shape)
    x = torch.randn(2, *before.latent_shape)
    assert torch.equal(before.decode(x), after.decode(x))

    first = contents(folder)
    again = qncd(*arguments, ok=False)
    assert (again.exit_code, "--force replaces it" in again.stderr) == (4, True)
    assert contents(folder) == first
    assert qncd(*arguments, "--force").stdout.startswith("made/folder: ")
    assert contents(folder) == first
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


def test_convert_leaves_what_is_no_diffusers_folder(files, qncd):
    (qncd.folder / "mine").mkdir()
    (qncd.folder / "mine/letter.txt").write_text("dear")
    arguments = ["convert", files[0], "--compvis-config", files[1], "--force", "--out"]
    result = qncd(*arguments, "mine", ok=False)
    assert (result.exit_code, "no diffusers folder" in result.stderr) == (4, True)
    assert [p.name for p in (qncd.folder / "mine").iterdir()] == ["letter.txt"]
    result = qncd(*arguments, "mine/letter.txt", ok=False)
    assert (result.exit_code, "is a file" in result.stderr) == (4, True)


def test_convert_writes_nothing_for_a_checkpoint_that_does_not_fit(files, qncd):
    tensors = torch.load(files[0], weights_only=True)["state_dict"]
    del tensors[CONV]
    torch.save(tensors, files[0])
    result = qncd("convert", files[0], "--compvis-config", files[1], "--out", "made", ok=False)
    assert result.exit_code == 5
    assert CONV in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (qncd.folder / "made").exists()


def test_convert_tells_where_it_cannot_write(files, qncd):
    (qncd.folder / "taken").write_text("")
    arguments = ["convert", files[0], "--compvis-config", files[1], "--out", "taken/made"]
    result = qncd(*arguments, ok=False)
    assert result.exit_code == 4
    assert "cannot be written" in result.stderr


# ---- at full size --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ldm_4_imagenet_at_full_size(tmp_path):
    """400.9 M parameters; takes half a minute of one core, 5 GiB of memory and 2 GB of disk."""
    CliRunner().invoke(full_size_ldm4.cli, ["write", str(tmp_path)], catch_exceptions=False)
    found = full_size_ldm4.differences(tmp_path, side=16)
    assert found["prediction of noise, float32"] < 1e-5
    assert found["decoded image, float64"] < 1e-9
    model = load_model(str(tmp_path / "model.ckpt"), compvis_config=str(tmp_path / "config.yaml"))
    assert sum(p.numel() for p in model.denoiser.parameters()) == 400_920_579
