"""Stable Diffusion's CompVis checkpoints against the computation in compvis_reference.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compvis_reference import LatentDiffusion, TextSizes
from conftest import tiny_config
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers_pipelines import LETTERS, TOKENS, tokenizer_in
from safetensors.torch import save_file
from torch import Tensor

from qncd_cli.errors import ModelError
from qncd_cli.models.compvis.checkpoint import compvis_pipeline, unet_class
from qncd_cli.models.compvis.config import first_stage_options, read_yaml, unet_options
from qncd_cli.models.compvis.keys import first_stage_sources, unet_sources
from qncd_cli.models.compvis.text import text_encoder, text_options
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts

from .trees import SD_V1, SD_V2, SMALL_TEXT, changed

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = TextSizes(vocabulary=TOKENS, positions=9, width=128, layers=3)
TEXTS = ("a red shoe", "Bag")
QUERY = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"

TOKEN = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def tokens(text: str, pad: int) -> list[int]:
    """By hand: no merges, so that every letter is a token; at most 9 with both ends."""
    ids = []
    for word in text.lower().split():
        places = [LETTERS.index(letter) for letter in word]
        ids += [*places[:-1], places[-1] + len(LETTERS)]
    ids = [TOKENS - 2, *ids[:7], TOKENS - 1]
    return ids + [pad] * (9 - len(ids))


class Case:
    """A reduced checkpoint on disk, its YAML, its tokenizer, and what they were made from."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        self.pad = {"1.x": TOKENS - 1, "2.x": 0}[kind]
        torch.manual_seed(0)
        self.theirs = LatentDiffusion(SMALL_TEXT[kind], SIZES).eval().requires_grad_(False)
        self.tokenizer = str(folder / "tokens")
        tokenizer_in(Path(self.tokenizer))
        self.config = str(folder / "config.yaml")
        Path(self.config).write_text(yaml.safe_dump(SMALL_TEXT[kind]))
        self.checkpoint = self.write(dict(self.theirs.state_dict()))

    def write(self, tensors: dict[str, Tensor], name: str = "model.ckpt") -> str:
        path = self.folder / name
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save({"epoch": 3, "state_dict": tensors}, path)
        return str(path)

    def load(self, **changes: Any) -> Any:
        options = {"compvis_config": self.config, "tokenizer": self.tokenizer}
        checkpoint = changes.pop("checkpoint", self.checkpoint)
        return load_model(checkpoint, prompts=Prompts(TEXTS, "bad"), **{**options, **changes})

    def error(self, **changes: Any) -> str:
        with pytest.raises(ModelError) as caught:
            self.load(**changes)
        assert "\n" not in str(caught.value)
        return f"{caught.value} [{caught.value.hint}]"


@pytest.fixture(scope="module", params=SMALL_TEXT)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Case:
    return Case("1.x", tmp_path_factory.mktemp("sd1"))


# ---- the same computation ------------------------------------------------------------------------


def test_text_denoiser_and_decoder_compute_what_compvis_computes(case):
    ours, theirs = case.load(), case.theirs
    assert (ours.latent_shape, ours.num_classes) == ((4, 8, 8), 2)
    contexts = [theirs.cond_stage_model(torch.tensor([tokens(t, case.pad)])) for t in TEXTS]
    context = torch.cat(contexts)
    condition = ours.condition(torch.tensor([0, 1]))
    torch.testing.assert_close(condition["encoder_hidden_states"], context, **TOLERANCE)
    negative = theirs.cond_stage_model(torch.tensor([tokens("bad", case.pad)]))
    null = ours.null_condition(1)["encoder_hidden_states"]
    torch.testing.assert_close(null, negative, **TOLERANCE)

    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 977])
    eps = ours.denoiser(x, t, **condition).sample
    expected = theirs.model.diffusion_model(x, t, context)
    torch.testing.assert_close(eps, expected, **TOLERANCE)
    image = theirs.first_stage_model.decode(x / 0.18215)
    pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (ours.decode(x).float() - pixels).abs().max() <= 1  # a rounding may fall otherwise
    vae = compvis_pipeline(case.checkpoint, case.config, case.tokenizer).vae
    torch.testing.assert_close(vae.decode(x / 0.18215).sample, image, **TOLERANCE)
    prediction = ours.scheduler_config["prediction_type"]
    assert prediction == {"1.x": "epsilon", "2.x": "v_prediction"}[case.kind]


def test_convert_writes_a_folder_that_diffusers_loads_to_the_same_model(case, tmp_path, qncd):
    files = ["--compvis-config", case.config, "--tokenizer", case.tokenizer]
    data = qncd("convert", case.checkpoint, *files, "--out", "made", "--json").data
    assert data["pipeline"] == "StableDiffusionPipeline"
    made = StableDiffusionPipeline.from_pretrained(tmp_path / "made")
    before = compvis_pipeline(case.checkpoint, case.config, case.tokenizer)
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(p, name).state_dict() for p in (before, made))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert data["parameters"][name] == sum(t.numel() for t in ours.values())
    assert made.scheduler.config.beta_end == 0.012
    with torch.no_grad():
        texts = made.encode_prompt(list(TEXTS), "cpu", 1, False)[0]
    expected = case.load().condition(torch.tensor([0, 1]))["encoder_hidden_states"]
    torch.testing.assert_close(texts, expected, **TOLERANCE)


def test_safetensors_half_precision_and_averages(first):
    """And without the positions, which newer checkpoints leave out."""
    theirs, context = first.theirs, torch.randn(1, 9, 128)
    torch.manual_seed(1)
    other = LatentDiffusion(SMALL_TEXT["1.x"], SIZES).eval().requires_grad_(False)
    tensors = {**theirs.state_dict(), **other.averages()}
    del tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    tensors = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
    checkpoint = first.write(tensors, "ema.safetensors")
    model = first.load(checkpoint=checkpoint)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    expected = other.half().float().model.diffusion_model(x, t, context)
    found = model.denoiser(x, t, encoder_hidden_states=context).sample
    torch.testing.assert_close(found, expected, **TOLERANCE)
    pipeline = compvis_pipeline(checkpoint, first.config, first.tokenizer)
    assert pipeline.text_encoder.dtype == torch.float16


def test_it_is_calibrated_quantized_and_sampled(first, qncd):
    tree = tiny_config(
        Path(first.checkpoint),
        model__compvis_config=first.config,
        sampling={"steps": 2, "guidance_scale": 2.0, "prompts": list(TEXTS)},
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 1},
    )
    tree["model"]["tokenizer"] = first.tokenizer
    qncd.write_config(tree)
    qncd("calibrate", "--config", "tiny.yaml", "--run-dir", "run")
    qncd("quantize", "--run-dir", "run")
    qncd("sample", "--run-dir", "run", "--num", "2")
    assert len(list((qncd.folder / "run").rglob("*.png"))) >= 2


def test_digest_follows_the_tokenizer(first, tmp_path):
    before = first.load().digest
    copy = shutil.copytree(first.tokenizer, tmp_path / "copy")
    assert first.load(tokenizer=str(copy)).digest == before
    vocabulary = copy / "vocab.json"
    vocabulary.write_text(vocabulary.read_text() + "\n")
    assert first.load(tokenizer=str(copy)).digest != before


# ---- names and shapes as published ---------------------------------------------------------------

# From ldm/modules/diffusionmodules/openaimodel.py, ldm/modules/attention.py with v1-inference.yaml
# of CompVis/stable-diffusion, and transformers' CLIPTextModel of openai/clip-vit-large-patch14.
PUBLISHED_1 = {
    "model.diffusion_model.time_embed.0.weight": [1280, 320],
    "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
    "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "model.diffusion_model.input_blocks.7.1.proj_in.weight": [1280, 1280, 1, 1],
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": [10240, 1280],
    "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight": [320, 640, 1, 1],
    "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
    "first_stage_model.encoder.conv_out.weight": [8, 512, 3, 3],
    "first_stage_model.decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
    "first_stage_model.quant_conv.weight": [8, 8, 1, 1],
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [49408, 768],
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": [77, 768],
    "cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77],
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": [3072, 768],
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.bias": [768],
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": [768],
}
# The same of Stability-AI/stablediffusion with v2-inference-v.yaml, and of open_clip's ViT-H-14.
PUBLISHED_2 = {
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320],
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024],
    "cond_stage_model.model.positional_embedding": [77, 1024],
    "cond_stage_model.model.token_embedding.weight": [49408, 1024],
    "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": [3072, 1024],
    "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.bias": [1024],
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": [4096, 1024],
    "cond_stage_model.model.ln_final.weight": [1024],
    "cond_stage_model.model.text_projection": [1024, 1024],
}


class Vocabulary:
    """Of CLIP's size and without its words."""

    bos_token_id, eos_token_id, pad_token_id = 49406, 49407, 49407

    def __len__(self) -> int:
        return 49408


class Name(str):
    """Stands for a tensor of which only the name counts; q, k and v are parts of it."""

    shape = (1,)

    def __getitem__(self, part: Any) -> Name:
        return Name(self)

    def clone(self) -> Name:
        return self

    detach = clone


@pytest.mark.parametrize(
    ("tree", "published", "counts"),
    [  # parameters as Stability and CompVis state them: 860 M, 866 M; 123 M and 340 M of text
        (SD_V1, PUBLISHED_1, (859_520_964, 83_653_863, 123_060_480)),
        (SD_V2, PUBLISHED_2, (865_910_724, 83_653_863, 340_387_840)),
    ],
    ids=["1.x", "2.x"],
)
def test_full_size_has_the_published_names_and_shapes(tree, published, counts, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    params = read_yaml(str(path))
    with torch.device("meta"):
        tensors = LatentDiffusion(tree).state_dict()
        options = unet_options(params)
        unet, vae = unet_class(options)(**options), AutoencoderKL(**first_stage_options(params))
    text = text_encoder("model.ckpt", tensors, text_options(params), Vocabulary())
    assert {name: list(tensors[name].shape) for name in published} == published
    parts = (unet, vae, text.module)
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == counts
    assert unet.config.sample_size == 64

    levels = len(vae.config.block_out_channels)
    ours = {
        "model.diffusion_model.": unet_sources(unet.state_dict(), 2),
        "first_stage_model.": first_stage_sources(vae.state_dict(), levels),
        "": text.sources,
    }
    names = {p: {n: p + s.key for n, s in sources.items()} for p, sources in ours.items()}
    used = {key for found in names.values() for key in found.values()}
    schedule = {key for key in tensors if "." not in key}
    assert used | schedule | text.unused == set(tensors)
    assert not used & (schedule | text.unused)

    keys = {name: Name(name) for name in tensors}
    theirs = convert_ldm_unet_checkpoint(keys, unet.config)
    assert names["model.diffusion_model."] == theirs
    assert names["first_stage_model."] == convert_ldm_vae_checkpoint(keys, vae.config)
    if tree is SD_V1:
        theirs = convert_ldm_clip_checkpoint(keys)
        theirs.pop("text_model.embeddings.position_ids")
    else:
        theirs = convert_open_clip_checkpoint(text.module, keys)
    flat = {name.removeprefix("text_model."): key for name, key in names[""].items()}
    assert flat == {name.removeprefix("text_model."): key for name, key in theirs.items()}


# ---- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(QUERY), f"1 tensor missing ({QUERY})"),
        (lambda t: t.update({QUERY + "s": t.pop(QUERY)}), f"1 tensor not known ({QUERY}s)"),
        (lambda t: t.update({QUERY: t[QUERY][:64]}), f"{QUERY} is [64, 128], expected [128, 128]"),
        (
            lambda t: [t.pop(k) for k in list(t) if ".embeddings." in k],
            "2 tensors missing (cond_stage_model.transformer.text_model.embeddings.token_embed",
        ),
        (lambda t: t.update({TOKEN: t[TOKEN][0]}), f"1 tensor of another shape ({TOKEN})"),
        (lambda t: t.update({TOKEN: t[TOKEN][:, :9]}), "is 9 wide, no multiple of 64"),
        (
            lambda t: t.update({"cond_stage_model.logit_scale": torch.ones(())}),
            "1 tensor not known (cond_stage_model.logit_scale)",
        ),
    ],
)
def test_a_text_tensor_that_does_not_fit_is_named(change, said, first):
    tensors = dict(first.theirs.state_dict())
    change(tensors)
    assert said in first.error(checkpoint=first.write(tensors, "changed.ckpt"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cond__version": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}, "only OpenAI's CLIP"),
        ({"cond__layer": "hidden", "cond__layer_idx": 11}, "layer: 'hidden'"),
        ({"cond__max_length": 77}, "reads 9 tokens, the YAML's max_length is 77"),
        ({"cond__trick": 1}, "trick: 1, which is not known"),
        ({"unet__context_dim": 64}, "context_dim 64 of the U-Net is not the width"),
        ({"cond_stage_config": SD_V2["model"]["params"]["cond_stage_config"]}, "tensors missing"),
    ],
)
def test_a_yaml_that_does_not_fit_is_named(changes, said, first, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(changed(SMALL_TEXT["1.x"], **changes)))
    assert said in first.error(compvis_config=str(path))


def test_a_tokenizer_that_is_not_there_or_of_another_model(first, tmp_path):
    empty = first.error(tokenizer=str(tmp_path))
    assert f"has {TOKENS} tokens, the tokenizer {tmp_path} has 2" in empty
    assert "set model.tokenizer" in empty
    missing = first.error(tokenizer=str(tmp_path / "none"))
    assert "is not to be had" in missing
    assert "set model.tokenizer" in missing


def test_a_model_that_reads_no_text_takes_no_tokenizer(first, tmp_path):
    path = tmp_path / "config.yaml"
    tree = changed(SMALL_TEXT["1.x"], cond_stage_config="__is_unconditional__")
    path.write_text(yaml.safe_dump(tree))
    assert "context_dim 128" in first.error(compvis_config=str(path))
    unet = tree["model"]["params"]["unet_config"]["params"]
    unet |= {"use_spatial_transformer": False, "context_dim": None}
    path.write_text(yaml.safe_dump(tree))
    assert "reads no text" in first.error(compvis_config=str(path))
