"""A LoRA in floating point beside the layers of a quantized run (sample --lora-branch)."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline
from diffusers_pipelines import save
from safetensors.torch import load_file, save_file

from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.loading import load_model, open_pipeline
from qncd_cli.models.text import Prompts

TEXTS = ["a red shoe", "a blue bag"]


def lora_of(pipeline, path, scale=0.3):
    """Of attention and a convolution of the denoiser, and of a text encoder where there is one."""
    draws, tensors = torch.Generator().manual_seed(3), {}
    for part in ("unet", "text_encoder"):
        module = pipeline.components.get(part)
        for name, layer in () if module is None else module.named_modules():
            if name.endswith(("to_q", "to_v", "to_out.0", "conv1", "q_proj")):
                out, inside, *kernel = layer.weight.shape
                ones = (1, 1) if kernel else ()
                down = scale * torch.randn((2, inside, *kernel), generator=draws)
                tensors[f"{part}.{name}.lora_A.weight"] = down
                up = scale * torch.randn((out, 2, *ones), generator=draws)
                tensors[f"{part}.{name}.lora_B.weight"] = up
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantized run of a tiny Stable Diffusion, and a LoRA of it."""
    room = tmp_path_factory.mktemp("branch")
    folder = save("StableDiffusionPipeline", room / "model")
    lora_of(DiffusionPipeline.from_pretrained(folder), room / "style.safetensors")
    work = Qncd(room)
    tree = tiny_config(folder, sampling__prompts=TEXTS, sampling__steps=2)
    tree["calibration"] = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    tree["quantization"]["weights"]["bits"] = 8
    work.write_config(tree)
    work("calibrate", "--config", "tiny.yaml", "--run-dir", "run")
    work("quantize", "--run-dir", "run")
    return room


@pytest.fixture
def work(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "style.safetensors", tmp_path)
    return Qncd(tmp_path)


def latents(work, *options, run="run", name="quantized"):
    work("sample", "--run-dir", run, "--num", "2", "--name", name, *options)
    return load_file(work.folder / run / "samples" / name / "latents.safetensors")["latents"]


def test_a_branch_is_the_fused_lora(work):
    """Exactly at full precision, text encoder included; as far as rounding goes when quantized."""
    lora = work.folder / "style.safetensors:0.8"
    plain = latents(work, "--full-precision", name="plain")
    full = latents(work, "--full-precision", "--lora-branch", lora, name="full")
    branch = latents(work, "--lora-branch", lora, name="branch")
    work("quantize", "--run-dir", "run", "--lora", lora, "--into", "fused")
    fused = latents(work, "--full-precision", run="fused", name="full")
    torch.testing.assert_close(full, fused, rtol=1e-4, atol=1e-4)
    requantized = latents(work, run="fused")
    assert sqnr_db(full, branch) > 25 > sqnr_db(full, plain) + 10
    assert sqnr_db(requantized, branch) > 25
    twice = latents(
        *(work, "--full-precision", "--lora-branch", lora),
        *("--lora-branch", f"{work.folder}/style.safetensors:-0.8"),
        name="twice",
    )
    text = load_model(
        json.loads((work.folder / "run/samples/full/manifest.json").read_text())["source"],
        prompts=Prompts(tuple(TEXTS)),
    )
    assert text.branches == {}
    torch.testing.assert_close(twice, plain, rtol=1e-3, atol=1e-3)


def test_a_branch_is_part_of_a_sets_lineage(work):
    lora = work.folder / "style.safetensors"
    latents(work, "--lora-branch", lora)
    manifest = json.loads((work.folder / "run/samples/quantized/manifest.json").read_text())
    assert manifest["sampling"]["lora_branch"] == [f"{lora}:1"]
    again = work("sample", "--run-dir", "run", "--num", "2", "--lora-branch", lora)
    assert "0 images" in again.stdout + again.stderr or "unchanged" in again.stdout
    for other in ((), ("--lora-branch", f"{lora}:0.5")):
        refused = work("sample", "--run-dir", "run", "--num", "2", *other, ok=False)
        assert refused.exit_code != 0 and "other settings" in refused.stderr, refused.stderr
    tensors = load_file(lora)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, lora)
    refused = work("sample", "--run-dir", "run", "--num", "2", "--lora-branch", lora, ok=False)
    assert refused.exit_code != 0
    latents(work, "--lora-branch", lora, name="doubled")
    work("sample", "--run-dir", "run", "--num", "2", "--full-precision", "--lora-branch", lora)
    refused = work("eval", "--run-dir", "run", "--name", "quantized", ok=False)
    assert refused.exit_code == 3 and "a file was changed" in refused.stderr, refused.stderr
    found = work("eval", "--run-dir", "run", "--name", "doubled", "--json").data
    assert found["fidelity"]["sqnr_latents_db"] > 8, found["fidelity"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lora-branch", "no.safetensors"), "no file no.safetensors"),
        (("--lora-branch", "style.safetensors:nan"), "FILE or FILE:WEIGHT"),
        (("--lora-branch", "style.safetensors", "--compile"), "has no LoRA beside its layers"),
        (("--lora-branch", "other.safetensors"), "is it a LoRA of another model?"),
        (("--lora-branch", "ranks.safetensors"), "is it a LoRA of another model?"),
    ],
)
def test_what_a_branch_cannot_be_is_one_line(work, options, said):
    tensors = load_file(work.folder / "style.safetensors")
    first = next(iter(tensors))
    other = {name.replace("to_q", "to_other"): tensor for name, tensor in tensors.items()}
    save_file(other, work.folder / "other.safetensors")
    ranks = {**tensors, first: torch.cat([tensors[first], tensors[first]])}
    save_file(ranks, work.folder / "ranks.safetensors")
    refused = work("sample", "--run-dir", "run", "--num", "2", *options, ok=False)
    assert refused.exit_code in (3, 5, 6), (refused.exit_code, refused.exception)
    assert said in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 3
    assert not (work.folder / "run/samples/quantized/000000.png").exists()


def test_calibrate_and_quantize_take_none(work):
    for command in ("calibrate", "quantize"):
        target = ("--config", "run/config.yaml") if command == "calibrate" else ()
        setting = ("--set", 'sampling.lora_branch=["style.safetensors"]')
        refused = work(command, *target, "--run-dir", "run", *setting, ok=False)
        assert refused.exit_code == 3 and "of qncd sample alone" in refused.stderr, refused.stderr


def test_eval_draws_full_precision_with_the_prompts_of_the_set(work):
    """Not with those of the run, which were taken before (images, sizes and LoRAs likewise)."""
    prompt = ("--prompt", "a red bag")
    latents(work, *prompt, name="other")
    direct = latents(work, "--full-precision", *prompt, name="direct")
    work("eval", "--run-dir", "run", "--name", "other")
    drawn = [
        load_file(path)["latents"]
        for path in sorted(work.folder.rglob("latents.safetensors"))
        if path.parent.name not in ("other", "direct")
    ]
    assert len(drawn) == 1
    assert torch.equal(drawn[0], direct)


def test_a_pipeline_of_classes_takes_a_lora_of_its_denoiser(tiny_model, tmp_path):
    """Fused by hand, too; the packaged models are such."""
    pipeline, _ = open_pipeline(str(tiny_model), None)
    lora = lora_of(pipeline, tmp_path / "style.safetensors")
    fused = load_model(str(tiny_model), loras=(f"{lora}:0.5",))
    beside = load_model(str(tiny_model), branch=(f"{lora}:0.5",))
    for key, tensor in load_file(lora).items():
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removeprefix("unet.").removesuffix(".lora_A.weight")
        up = load_file(lora)[key.replace("lora_A", "lora_B")]
        product = (up.flatten(1) @ tensor.flatten(1)).view(len(up), *tensor.shape[1:])
        own = beside.denoiser.get_submodule(name).weight
        found = fused.denoiser.get_submodule(name).weight
        torch.testing.assert_close(found, own + 0.5 * product, rtol=1e-5, atol=1e-6)
        assert name in beside.branches
