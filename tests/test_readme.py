"""The README's way for a model of one's own, as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers_pipelines as tiny
import pytest
from conftest import SHALLOW, Qncd
from diffusers import UNet2DConditionModel

from qncd_cli.config.model_card import PIPELINES

README = Path(__file__).resolve().parents[1] / "README.md"


def section(title: str) -> str:
    text = README.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return found


def test_the_section_is_as_short_as_it_says():
    text = section("Your own model")
    assert len(block(text, "yaml").splitlines()) == 8
    assert len([line for line in block(text, "python").splitlines() if line]) <= 6


@pytest.mark.slow
def test_your_own_model(tmp_path, monkeypatch):
    """With a tenth of the steps that the pipeline has of its own: 64 images twice are many."""
    monkeypatch.setitem(PIPELINES, "StableDiffusionPipeline", (5, 7.5, "prompts"))
    text = section("Your own model")
    commands = re.findall(r"^    (qncd .*)$", text, flags=re.MULTILINE)
    unet = tiny.save("StableDiffusionPipeline", tmp_path / "models" / "my-model") / "unet"
    options = {**UNet2DConditionModel.load_config(unet), **SHALLOW}
    UNet2DConditionModel.from_config(options).save_pretrained(unet)
    (tmp_path / "prompts.txt").write_text("red\nblue\n")
    (tmp_path / "my.yaml").write_text(block(text, "yaml"))
    qncd = Qncd(tmp_path)
    assert len(commands) == 5
    for command in commands:
        qncd(*shlex.split(command)[1:])
    assert len(list((tmp_path / "runs" / "my" / "samples" / "quantized").glob("*.png"))) == 16
    assert len(list((tmp_path / "runs").glob("my-model_w4a8/samples/quantized/*.png"))) == 64
    assert (tmp_path / "runs" / "my" / "report.html").is_file()
    loaded = subprocess.run(
        [sys.executable, "-c", block(text, "python")], cwd=tmp_path, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert (tmp_path / "bicycle.png").is_file()
