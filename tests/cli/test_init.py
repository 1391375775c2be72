"""From a model alone: qncd init MODEL, qncd run MODEL, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers_pipelines as tiny
import pytest
import yaml
from conftest import Qncd

from qncd_cli.config.keys import sections
from qncd_cli.config.loading import load_config
from qncd_cli.models.zoo import zoo_models

QUICK = (
    *("--set", "sampling.steps=2"),
    *("--set", "calibration.trajectories=2"),
    *("--set", "quantization.preset=minmax"),
    *("--num", "2"),
)
ALL = [*tiny.TEXT, *tiny.FLUX, *tiny.CLASSES, *tiny.UNCONDITIONAL]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    return tiny.save("StableDiffusionPipeline", tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture
def empty(tmp_path) -> Qncd:
    return Qncd(tmp_path)


def one_line(result) -> str:
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line


# ---- init ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_what_init_writes_is_a_configuration_of_that_model(empty, name):
    folder = tiny.save(name, empty.folder / "mine")
    made = empty("init", "mine")
    (empty.folder / "my.yaml").write_text(made.stdout)
    config = empty("calibrate", "--config", "my.yaml", "--dry-run", "--json").data["config"]
    assert config["model"]["source"] == str(folder)
    assert config["quantization"]["preset"] == "best"
    assert config["quantization"]["activations"]["observer"] == "output"
    text = name in {**tiny.TEXT, **tiny.FLUX}
    assert len(config["sampling"]["prompts"] or ()) == (2 if text else 0)
    if not name.startswith(("PixArtAlpha", "Flux")):  # thousands of tokens: too much here
        empty("calibrate", "--config", "my.yaml", "--plan")


def test_every_line_that_sets_something_is_explained(empty, text_model):
    lines = empty("init", text_model).stdout.splitlines()
    keys = [i for i, line in enumerate(lines) if ": " in line and not line.lstrip().startswith("#")]
    assert len(keys) > 8
    for i in keys:
        assert lines[i - 1].lstrip().startswith("# "), lines[i]
    assert all(len(line) <= 100 for line in lines if str(text_model) not in line)


def test_the_file_says_what_the_folder_is(empty, text_model):
    text = empty("init", text_model).stdout
    assert text.startswith("# sd: StableDiffusionPipeline, 0.1 M parameters, images of 16 x 16")
    assert "# negative_prompt: ''" in text
    data = empty("init", text_model, "--json").data
    assert yaml.safe_load(data["yaml"]) == data["config"]
    assert data["model"]["needs"] == "prompts"


@pytest.mark.parametrize(("version", "size"), [("0.8.1", 64), ("0.9.0", 16), (None, 16)])
def test_the_size_of_an_early_folder_is_what_its_pipeline_makes_of_it(
    empty, text_model, version, size
):
    from diffusers import UNet2DConditionModel

    from qncd_cli.models.schedule import corrected

    folder = shutil.copytree(text_model, empty.folder / "early")
    path = folder / "unet" / "config.json"
    config = {**json.loads(path.read_text()), "_diffusers_version": version, "sample_size": 16}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    unet = UNet2DConditionModel.from_config(json.loads(path.read_text()))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    corrected("StableDiffusionPipeline", unet, scheduler)
    assert unet.config.sample_size == size
    image = empty("init", folder, "--json").data["model"]["image"]
    latents = empty("init", text_model, "--json").data["model"]["image"][0] // 8
    assert image == [size * latents] * 2


def test_the_type_is_that_of_the_weights(empty, text_model):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(text_model, empty.folder / "half")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for dtype, expected in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
        save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path)
        assert empty("init", folder, "--json").data["config"]["model"]["dtype"] == expected


@pytest.mark.parametrize("model", [f"zoo:{name}" for name in zoo_models()])
def test_a_packaged_model_has_a_configuration_too(empty, model):
    config = empty("init", model, "--json").data["config"]
    assert config["sampling"]["classes"] == "all"
    assert config["model"]["source"] == model


def test_a_checkpoint_takes_the_yaml_beside_it(empty):
    stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder"}
    (empty.folder / "model.ckpt").touch()
    assert "--compvis-config" in one_line(empty("init", "model.ckpt", ok=False))
    tree = {"model": {"params": {"cond_stage_config": stage}}}
    (empty.folder / "cin256.yaml").write_text(yaml.safe_dump(tree))
    config = empty("init", "model.ckpt", "--json").data["config"]
    assert config["model"]["compvis_config"] == str(empty.folder / "cin256.yaml")
    assert config["sampling"]["steps"] == 20


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere", "no such model"),
        (".", "no model_index.json"),
        ("zoo:fashion-lmd", "did you mean zoo:fashion-ldm?"),
        ("some-owner/some-model", "hf download some-owner/some-model"),
        ("random:ldm4", "qncd bench random:ldm4"),
        ("a red shoe " * 40, "no such model"),
        ("nowhere.ckpt", "no such file"),
    ],
)
def test_what_is_no_model_is_one_line(empty, model, said):
    result = empty("init", model, ok=False)
    assert result.exit_code == 5
    assert said in one_line(result)


def test_a_pipeline_that_is_not_supported_names_those_that_are(empty, text_model):
    folder = shutil.copytree(text_model, empty.folder / "other")
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace('"StableDiffusionPipeline"', '"KolorsPipeline"'))
    assert "KolorsPipeline is not supported" in one_line(empty("init", "other", ok=False))
    result = empty("run", "other", "--bits", "w4a8", ok=False)
    assert result.exit_code == 5
    assert "KolorsPipeline is not supported" in one_line(result)


def test_init_imports_neither_torch_nor_diffusers(text_model):
    code = (
        "import sys\nfrom qncd_cli.cli.starter import facts_of, starter_yaml\n"
        f"assert starter_yaml(facts_of({str(text_model)!r}))\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# ---- run and calibrate with a model alone -------------------------------------------------------


def test_run_needs_no_configuration(empty, tiny_model):
    shutil.copytree(tiny_model, empty.folder / "mine")
    result = empty("run", "mine", "--bits", "w8a6", *QUICK)
    run = empty.folder / "runs" / "mine_w8a6"
    config = load_config(str(run / "config.yaml"))
    weights, activations = config.quantization.weights, config.quantization.activations
    assert (weights.bits, activations.bits) == (8, 6)
    assert config.model.source == str(empty.folder / "mine")
    assert len(list((run / "samples" / "quantized").glob("*.png"))) == 2
    first = result.stderr.splitlines()[0]
    assert "runs/mine_w8a6: 2 images (seeds 0 to 1) of 2 ddim steps, guidance 3" in first
    assert "roughly" in result.stderr.splitlines()[1]
    again = empty("run", "mine", "--bits", "w8a6", *QUICK)
    assert "roughly" not in again.stderr


def test_prompts_come_from_a_file_or_the_command_line(empty, text_model):
    (empty.folder / "p.txt").write_bytes("\ufeffred\r\nblue\r\n".encode())
    dry = ("--dry-run", "--json")
    of_file = empty("calibrate", text_model, "--prompts", "p.txt", *dry).data["config"]
    assert of_file["sampling"]["prompts"] == ["red", "blue"]
    result = empty("run", text_model, "--prompt", "a red shoe", "--plan", "--json").data
    assert result["samples"] == 64


@pytest.mark.parametrize("how", ["--dry-run", "--plan", None])
def test_a_text_model_without_prompts_is_refused_before_anything_is_loaded(
    empty, text_model, how, monkeypatch
):
    from qncd_cli.models import loading

    monkeypatch.setattr(loading, "load_model", None)
    result = empty("calibrate", text_model, *([how] if how else []), ok=False)
    assert result.exit_code == 3
    assert "needs sampling.prompts (--prompts FILE" in one_line(result)
    assert not (empty.folder / "runs").exists()


def test_bits_name_the_run_of_a_configuration_too(empty, tiny_model):
    from qncd_cli.cli.wanted import Wanted

    assert Wanted("a/fashion_ldm_w4a8.yaml", bits="W4A6").folder == Path("runs/fashion_ldm_w4a6")
    assert Wanted("ldm4_w4a8_paper", bits="w8a8").folder == Path("runs/ldm4_paper_w8a8")
    assert Wanted("fashion_ldm_w4a8").folder == Path("runs/fashion_ldm_w4a8")
    assert Wanted(None, "owner/name").folder == Path("runs/name_w4a8")
    assert Wanted(None, "zoo:fashion-ldm", "w4a6").folder == Path("runs/fashion-ldm_w4a6")
    assert Wanted(None, "a/model.ckpt", run_dir="here").folder == Path("here")
    config = Wanted("fashion_ldm_w4a8", bits="W4A6").config()
    assert config == load_config("fashion_ldm_w4a6")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "give either a model (MODEL) or a configuration (--config)"),
        (("zoo:fashion-ldm", "--config", "fashion_ldm_w4a8"), 2, "give either"),
        (("fashion_ldm_w4a8.yaml",), 2, "is a configuration: --config fashion_ldm_w4a8.yaml"),
        (("zoo:fashion-ldm", "--bits", "4"), 3, "--bits 4: expected widths like w4a8"),
        (("zoo:fashion-ldm", "--bits", "fp"), 3, "--bits fp: quantizes nothing"),
        (("zoo:fashion-ldm", "--bits", "w9a8"), 3, "2 to 8 bits"),
        (("zoo:fashion-ldm", "--prompts", "no.txt"), 3, "no file no.txt"),
        (("some-owner/some-model", "--dry-run"), 5, "hf download"),
    ],
)
def test_what_calibrate_cannot_do_is_one_line(empty, arguments, code, said):
    result = empty("calibrate", *arguments, ok=False)
    assert result.exit_code == code
    assert said in one_line(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "LONG"),
        ("calibrate", "--config", "LONG"),
        ("calibrate", "zoo:fashion-ldm", "--set", "model.source=LONG"),
        ("calibrate", "zoo:fashion-ldm", "--prompts", "LONG"),
        ("calibrate", "LONG.ckpt"),
        ("init", "LONG"),
        ("ablate", "--config", "LONG"),
        ("run", "zoo:fashion-ldm", "--inception-weights", "LONG", "--num", "1"),
        ("inspect", "LONG"),
        ("quantize", "--run-dir", "LONG"),
        ("eval", "--images", "LONG"),
        ("eval", "--images", ".", "--reference", "LONG"),
        ("compare", "LONG"),
        ("bench", "LONG"),
        ("export", "--to", "diffusers", "LONG"),
        ("convert", "LONG", "--compvis-config", "LONG", "--out", "x"),
    ],
)
def test_a_whole_prompt_in_the_place_of_a_path_is_one_line(empty, arguments):
    prompt = "an astronaut riding a horse on the moon, " * 10
    result = empty(*(a.replace("LONG", prompt) for a in arguments), ok=False)
    assert result.exit_code in (2, 3, 4, 5, 6)
    line = one_line(result)
    assert "Traceback" not in line


def test_a_run_of_a_relative_folder_goes_on_in_another_directory(empty, tiny_model):
    shutil.copytree(tiny_model, empty.folder / "models" / "mine")
    calibrate = ("calibrate", "models/mine", "--bits", "w8a8", *QUICK[:-2])
    empty(*calibrate)
    elsewhere = Qncd(empty.folder / "models")
    run = str(empty.folder / "runs" / "mine_w8a8")
    elsewhere("quantize", "--run-dir", run)
    assert "unchanged, skipped" in empty(*calibrate).stdout


# ---- defaults and descriptions ------------------------------------------------------------------


def test_every_key_and_every_section_has_a_description():
    found = list(sections())
    assert {"model", "sampling", "quantization.weights", "correction.inter"} <= {
        section.path for section in found
    }
    for section in found:
        assert section.description, section.path
        for key in section.keys:
            assert key.description, key.path


def test_the_list_of_keys_is_the_whole_configuration():
    listed = {key.path for section in sections() for key in section.keys}
    tree = load_config("fashion_ldm_w4a8").to_dict()

    def leaves(node, path=""):
        for name, value in node.items():
            if isinstance(value, dict) and name != "overrides":
                yield from leaves(value, f"{path}{name}.")
            else:
                yield path + name

    assert set(leaves(tree)) == {path for path in listed if "<pattern>" not in path}


def test_run_draws_64_unless_told_otherwise(empty):
    plan = empty(
        "run",
        "--config",
        "ldm4_w4a8",
        "--set",
        "model.source=random:ldm4",
        "--set",
        "model.compvis_config=null",
        "--plan",
        "--json",
        ok=False,
    )
    assert json.loads(plan.stdout)["samples"] == 64
