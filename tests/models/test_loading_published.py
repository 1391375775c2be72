"""Folders as the hub has them: variants, links, parts left out, code and quantizers of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, tiny_config
from safetensors.torch import load_file, save_file

from qncd_cli.errors import ConfigError, ModelError
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import load_model, open_pipeline
from qncd_cli.models.prompt_cache import PromptCache
from qncd_cli.models.text import Prompts
from qncd_cli.models.weight_files import variant_of, variants, weight_files

TEXTS = Prompts(("red", "blue"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny.save("StableDiffusionPipeline", tmp_path_factory.mktemp("model") / "plain")


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "model")


def as_variant(folder: Path, part: str, variant: str, *, keep: bool = False) -> None:
    """Weights in half precision under a variant's name; keep: beside the plain ones."""
    path = next(p for p in (folder / part).glob("*.safetensors") if p.name.count(".") == 1)
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(half, path.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
    if not keep:
        path.unlink()


PARTS = ("unet", "vae", "text_encoder")

# ---- variants -----------------------------------------------------------------------------------


def test_a_folder_with_the_fp16_variant_alone_is_the_model_in_half_precision(folder, plain):
    for part in PARTS:
        as_variant(folder, part, "fp16")
    said: list[str] = []
    model = load_model(str(folder), prompts=TEXTS, tell=said.append)
    expected = load_model(str(plain), prompts=TEXTS)
    for ours, theirs in zip(
        model.denoiser.parameters(), expected.denoiser.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs.half().float())
    (line,) = said
    assert "text_encoder fp16; unet fp16; vae fp16" in line
    assert model_shapes(str(folder), torch.float32).parts["unet"].stored > 0


def test_plain_weights_are_taken_where_they_are_beside_a_variant(folder, plain):
    as_variant(folder, "unet", "fp16", keep=True)
    as_variant(folder, "text_encoder", "fp16")
    said: list[str] = []
    model = load_model(str(folder), prompts=TEXTS, tell=said.append)
    expected = load_model(str(plain), prompts=TEXTS)
    found, wanted = model.denoiser.state_dict(), expected.denoiser.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "unet" not in said[0].partition("taken: ")[2]


def test_of_several_variants_the_most_exact_is_taken_and_named(folder):
    for variant in ("fp16", "non_ema", "bf16"):
        as_variant(folder, "unet", variant, keep=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    said: list[str] = []
    load_model(str(folder), prompts=TEXTS, tell=said.append)
    assert "unet bf16, not fp16, non_ema" in said[0]


def test_a_tensor_missing_in_a_variant_is_an_error(folder):
    as_variant(folder, "unet", "fp16")
    path = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensors missing \(first: conv_in\.bias\)"):
        load_model(str(folder), prompts=TEXTS)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.safetensors", "model.fp16.safetensors"], ["", "fp16"]),
        (["model.fp16-00001-of-00002.safetensors"], ["fp16"]),
        (["model-00001-of-00002.fp16.safetensors"], ["fp16"]),
        (["diffusion_pytorch_model.fp16.bin", "config.json"], ["fp16"]),
        (["openvino_model.bin", "flax_model.msgpack", "LICENSE"], []),
    ],
)
def test_variants_are_read_from_the_names_of_files(tmp_path, names, found):
    for name in names:
        (tmp_path / name).touch()
    assert variants(tmp_path) == found
    assert variant_of(tmp_path) == ((found[0] or None) if found else None)
    assert all(path.suffix == ".safetensors" for path in weight_files(tmp_path))


def test_plan_and_calibrate_agree_on_a_variant(folder, tmp_path):
    for part in PARTS:
        as_variant(folder, part, "fp16")
    runner = Qncd(tmp_path)
    runner.write_config(
        tiny_config(
            folder,
            sampling={"steps": 2, "prompts": ["red"]},
            calibration={"trajectories": 2, "batch_size": 2},
            quantization__weights__rounding="nearest",
        )
    )
    runner("calibrate", "--config", "tiny.yaml", "--plan")
    done = runner("calibrate", "--config", "tiny.yaml")
    assert "a variant is taken" in done.stderr


def test_a_hub_id_with_the_fp16_variant_alone_is_downloaded(folder, monkeypatch):
    from diffusers import DiffusionPipeline

    from qncd_cli.models.model_folder import find_folder

    asked = []

    def download(source: str, variant: str | None = None) -> str:
        asked.append(variant)
        if variant != "fp16":
            raise OSError("Could not find the necessary `safetensors` weights (variant=None)")
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert find_folder("some-owner/some-model") == folder
    assert asked == [None, "fp16"]


# ---- parts --------------------------------------------------------------------------------------


def test_stable_diffusion_3_saved_without_t5_reads_zeros_in_its_place(tmp_path):
    from diffusers import DiffusionPipeline

    whole = tiny.save("StableDiffusion3Pipeline", tmp_path / "whole")
    less = DiffusionPipeline.from_pretrained(whole, text_encoder_3=None, tokenizer_3=None)
    less.save_pretrained(tmp_path / "less")
    model = load_model(str(tmp_path / "less"), prompts=Prompts(("a red shoe",)))
    expected, *_ = less.encode_prompt("a red shoe", None, None, do_classifier_free_guidance=False)
    found = model.condition(torch.tensor([0]))["encoder_hidden_states"]
    torch.testing.assert_close(found, expected)
    assert not found[:, 9:].any()


def test_export_leaves_out_a_safety_checker_that_cannot_be_loaded(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    said: list[str] = []
    pipeline, _ = open_pipeline(str(folder), None, tell=said.append)
    assert pipeline.components["safety_checker"] is None
    assert not pipeline.config.requires_safety_checker
    assert "without safety_checker, feature_extractor" in said[0]


# ---- refusals -----------------------------------------------------------------------------------


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def own_class(folder: Path) -> None:
    change_json(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    (folder / "unet" / "my_unet.py").write_text("class MyUNet: ...\n")


def own_pipeline(folder: Path) -> None:
    change_json(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])


def quantized(folder: Path) -> None:
    change_json(folder / "unet" / "config.json", quantization_config={"quant_method": "torchao"})


def exported(folder: Path) -> None:
    change_json(folder / "unet" / "config.json", quantization_config={"quant_method": "qncd"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (own_class, "unet is a class of its own (my_unet.MyUNet)"),
        (own_pipeline, "its pipeline is code of its own (pipeline.MyPipeline)"),
        (quantized, "the weights of unet are quantized already (torchao)"),
        (exported, "is a quantized model that qncd exported"),
    ],
)
def test_what_no_loader_here_reads_is_refused_with_the_reason(folder, change, said):
    change(folder)
    for load in (
        lambda: load_model(str(folder), prompts=TEXTS),
        lambda: model_shapes(str(folder), torch.float32),
    ):
        with pytest.raises(ModelError) as caught:
            load()
        assert said in str(caught.value)
        assert "complete" not in str(caught.value)


def test_the_reason_of_a_library_is_given_whole(folder):
    change_json(folder / "unet" / "config.json", block_out_channels=[8, 16, 32])
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), prompts=TEXTS)
    assert "`block_out_channels`" in str(caught.value)
    assert "`down_block_types`: " in str(caught.value)  # beyond the 160th character


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_link_to_nothing_in_a_hub_cache_is_named(folder, part):
    (folder / part).unlink()
    (folder / part).symlink_to("../../blobs/gone")
    with pytest.raises(ModelError, match="a link to nothing") as caught:
        load_model(str(folder), prompts=TEXTS)
    assert part in str(caught.value)


# ---- sizes and prompts --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_images_of_a_text_model_need_not_be_square(name, tmp_path):
    folder = tiny.save(name, tmp_path / "model")
    change_json(folder / "unet" / "config.json", sample_size=[8, 12])
    model = load_model(str(folder), prompts=TEXTS)
    assert model.latent_shape == (4, 8, 12)
    assert model.decode(torch.zeros(1, 4, 8, 12)).shape == (1, 3, 16, 24)
    ids = model.condition(torch.tensor([0])).get("added_cond_kwargs", {}).get("time_ids")
    ids = model.condition(torch.tensor([0])).get("time_ids", ids)
    if ids is not None:
        assert ids.tolist() == [[16, 24, 0, 0, 16, 24]]


LONG = "a red shoe a blue bag"
"""More than the nine tokens of the tiny tokenizer, which has no words, only letters."""


def test_prompts_that_are_cut_are_told_with_what_is_dropped(plain):
    said: list[str] = []
    load_model(str(plain), prompts=Prompts(("a bag", LONG)), tell=said.append)
    (line,) = said
    assert line.startswith("1 of 2 prompts is longer than the 9 tokens")
    assert LONG.replace(" ", "").endswith(line.rpartition("dropped: ")[2].replace(" ", ""))


def test_a_negative_prompt_that_is_cut_is_told_as_well(plain):
    said: list[str] = []
    load_model(str(plain), prompts=Prompts(("a bag",), LONG), tell=said.append)
    (line,) = said
    assert LONG in line and "is dropped" in line


def test_another_tokenizer_makes_the_prompts_anew(folder, tmp_path):
    """Those that were kept are of the words as the former one split them."""
    cache, found = PromptCache(tmp_path / "prompts"), []
    own, vocabulary = folder / "tokenizer", json.loads((folder / "tokens/vocab.json").read_text())
    (own / "tokenizer.json").unlink()  # published folders have the two files below
    (own / "vocab.json").write_text(json.dumps({**vocabulary, "re": vocabulary["z"]}))
    for merges in ("", "r e\n"):
        (own / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        model = load_model(str(folder), prompts=TEXTS, cache=cache)
        found.append(model.condition(torch.tensor([0]))["encoder_hidden_states"])
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_two_prompts_that_are_one_to_the_encoder_are_refused(name, tmp_path):
    folder = tiny.save(name, tmp_path / "model")
    same = Prompts(("abcdefgh one", "abcdefgh two"))
    with pytest.raises(ConfigError, match="differ only beyond the 9 tokens"):
        load_model(str(folder), prompts=same)
    repeated = Prompts(("abcdefgh one", "abcdefgh one"))
    load_model(str(folder), prompts=repeated)


def test_a_t5_encoder_has_the_pipelines_length(tmp_path):
    folder = tiny.save("PixArtSigmaPipeline", tmp_path / "model")
    said: list[str] = []
    load_model(str(folder), prompts=Prompts(("a " * 299 + "red",)), tell=said.append)
    assert "300 tokens" in said[0]
    assert said[0].endswith("dropped: red")
    load_model(str(folder), prompts=Prompts(("a " * 298 + "red",)), tell=said.append)
    assert len(said) == 1
