"""Text encoders in integers on the command line: what they promise, and what they refuse."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import Qncd, tiny_config
from diffusers_pipelines import save
from drawn_sets import images, manifest, refused
from processes import At, code_of, stderr_of

from qncd_cli.store import artifacts

RUN = Path("runs/tiny")
SAMPLES = RUN / "samples"
FILE = RUN / "text_encoders.safetensors"
PROMPTS = ["a red", "blue", "a shoe"]
W8A8, W4, OFF = (("--set", f"text_encoders.bits={bits}") for bits in (8, 4, "null"))
DRAW = ("sample", "--num", "3", "--no-compile")


def text_config(model: Path, **changes) -> dict:
    return tiny_config(
        model,
        sampling={"steps": 2, "guidance_scale": 2.0, "prompts": PROMPTS, "negative_prompt": "bag"},
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 8, "rounding": "nearest"},
        quantization__activations__observer="minmax",
        correction={"intra": "none", "inter": {"method": "none"}},
        **changes,
    )


@pytest.fixture(scope="module")
def encoding(tmp_path_factory) -> Path:
    """A folder with a run of Stable Diffusion's kind, sets with quantized text encoders and without
    them. Copy before changing."""
    folder = tmp_path_factory.mktemp("encoders")
    model = save("StableDiffusionPipeline", folder / "model")
    runner = Qncd(folder)
    runner.write_config(text_config(model))
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    runner(*DRAW, "--name", "before")
    runner("quantize", *W8A8)
    runner(*DRAW)
    return folder


@pytest.fixture
def work(encoding, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(encoding, tmp_path / "work"))


def test_off_changes_no_bit_and_on_changes_what_prompts_become(work):
    samples = work.folder / SAMPLES
    quantized = (work.folder / RUN / "quantized.safetensors").read_bytes()
    work(*DRAW, "--name", "off", *OFF)
    assert images(samples / "off") == images(samples / "before")
    off, before, on = (manifest(samples / name) for name in ("off", "before", "quantized"))
    assert off["digest"] == before["digest"] != on["digest"]
    assert "encoded_by" not in before and "text_encoders" not in before["digests"]
    assert off["latents"] == before["latents"] != on["latents"]
    work("quantize", *OFF)
    assert (work.folder / RUN / "quantized.safetensors").read_bytes() == quantized
    work("sample", "--full-precision", "--num", "2")
    assert "text_encoders" not in manifest(samples / "full")["digests"]


def test_prompts_are_kept_apart_by_what_encodes_them(work):
    kept = {path.name: path.read_bytes() for path in (work.folder / RUN / "prompts").iterdir()}
    assert len(kept) == 2 and len(set(kept.values())) == 2
    shutil.rmtree(work.folder / RUN / "prompts")
    whole = images(work.folder / SAMPLES / "quantized")
    work(*DRAW, "--name", "again")
    assert images(work.folder / SAMPLES / "again") == whole
    again = {path.name: path.read_bytes() for path in (work.folder / RUN / "prompts").iterdir()}
    assert again.items() < kept.items()  # the same bytes, and full precision's were not needed


def test_quantize_says_the_error_and_the_size_and_skips_what_holds(work):
    found = work("quantize", "--json").data
    assert found["skipped"]
    encoders = found["text_encoders"]
    assert encoders["fidelity"]["hidden states"]["sqnr_embeddings_db"] > 25
    assert encoders["bytes"] == (work.folder / FILE).stat().st_size
    assert "SQNR in dB of the embeddings of 3 prompts" in work("quantize").stdout
    made = (work.folder / FILE).read_bytes()
    (work.folder / FILE).unlink()
    assert not work("quantize", "--json").data["skipped"]
    assert (work.folder / FILE).read_bytes() == made
    work("quantize", *W4)
    narrow = artifacts.read(work.folder / FILE, "text_encoders")
    assert {(e["weight_bits"], e["activation_bits"]) for e in narrow.body["layers"].values()} == {
        (4, 32)
    }
    text = refused(work, *DRAW)
    assert "other settings (the quantized text encoders" in text


def test_shards_and_evaluation_know_them(work):
    samples = work.folder / SAMPLES
    for part in ("1/2", "2/2"):
        work(*DRAW, "--name", "all", "--shard", part, "--batch-size", "2")
    work("merge", "--name", "all")
    assert images(samples / "all") == images(samples / "quantized")
    assert "prompts encoded with W8A8: SQNR in dB of the embeddings" in work("eval").stderr
    metrics = json.loads((work.folder / RUN / "metrics.json").read_text())
    assert metrics["text_encoders"]["bits"] == 8
    assert "prompts encoded with" in (work.folder / RUN / "report.html").read_text()
    assert "prompts encoded with" not in work("eval", "--name", "before").stderr
    assert work("verify", "--num", "2").exit_code == 0
    work("quantize", *W4)
    assert "another text encoders in integers" in refused(work, "eval", "--name", "quantized")


def test_encoders_that_are_missing_damaged_or_another_model_s_are_refused(work, tmp_path):
    path = work.folder / FILE
    kept = path.read_bytes()
    text = refused(work, *DRAW, "--name", "four", *W4)
    assert "do not hold (text_encoders.bits: 8 -> 4)" in text
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "text_encoders" in refused(work, *DRAW, "--name", "new")
    path.unlink()
    text = refused(work, *DRAW, "--name", "new")
    assert "there are no text encoders of text_encoders.bits 8" in text
    assert "text_encoders.bits=8" in text
    other = Qncd(tmp_path / "other")
    other.folder.mkdir()
    model = save("StableDiffusionPipeline, v", other.folder / "model")
    other.write_config(text_config(model))
    other("calibrate", "--config", "tiny.yaml")
    other("quantize")
    shutil.copy(work.folder / RUN / "config.yaml", other.folder / "others.yaml")
    (other.folder / FILE).write_bytes(kept)
    text = refused(other, *DRAW, *W8A8)
    assert "the text encoders of text_encoders.bits do not hold" in text
    assert "model" in text


def test_models_without_prompts_and_odd_values_are_one_line(work, tiny_model):
    work.write_config(tiny_config(tiny_model, text_encoders__bits=8), "classes.yaml")
    for command in ("calibrate", "run"):
        text = refused(work, command, "--config", "classes.yaml")
        assert "of models that read prompts" in text
    for value in ("6", "16", "true"):
        text = refused(work, "quantize", "--set", f"text_encoders.bits={value}")
        assert "text_encoders.bits" in text
    (work.folder / "style.safetensors").write_bytes(b"")
    text = refused(work, *DRAW, "--set", "sampling.lora_branch=[style.safetensors]")
    assert "text_encoders.bits: null" in text
    text = refused(work, "ablate", "--config", "tiny.yaml", *W8A8)
    assert "ablate encodes all rows alike" in text


def test_killed_they_are_gone_on_with_and_come_out_the_same(work):
    made = (work.folder / FILE).read_bytes()
    (work.folder / FILE).unlink()
    quantize = ("quantize",)
    for write in (1, 2):
        assert code_of(work.folder, *quantize, at=At(write=write, before=write == 1)) == -9
        assert not (work.folder / FILE).exists()
    partial = work.folder / RUN / "partial" / "text_encoders"
    assert [*partial.iterdir()]
    stop = At(write=1, kill=signal.SIGTERM)
    assert code_of(work.folder, *quantize, at=stop) == 128 + signal.SIGTERM
    assert any("what quantize has done is kept" in line for line in stderr_of(work.folder))
    assert [*partial.iterdir()]
    assert code_of(work.folder, *quantize) == 0, stderr_of(work.folder)
    assert (work.folder / FILE).read_bytes() == made
    assert not (work.folder / RUN / "partial").exists()


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_four_stages_of_models_with_several_encoders(kind, tmp_path):
    runner = Qncd(tmp_path)
    model = save(kind, tmp_path / "model")
    tree = text_config(model, text_encoders__bits=8)
    del tree["sampling"]["negative_prompt"]  # which SDXL has zeros for
    runner.write_config(tree)
    said = runner("run", "--config", "tiny.yaml", "--num", "2").stdout
    assert "pooled over all" in said
    found = artifacts.read(tmp_path / FILE, "text_encoders").body
    encoders = {name.split(".")[0] for name in found["layers"]}
    assert encoders >= {"text_encoder", "text_encoder_2"}
    assert {*found["fidelity"]} == {"hidden states", "pooled", *encoders}
    assert all(each["sqnr_embeddings_db"] > 25 for each in found["fidelity"].values())
    assert manifest(tmp_path / SAMPLES / "quantized")["digests"]["text_encoders"]
