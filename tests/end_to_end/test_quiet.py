"""Standard error holds our own lines: what libraries warn of is not for who runs a command."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers_pipelines as tiny
import pytest
import yaml
from conftest import tiny_config


@pytest.fixture
def folder(tmp_path):
    """Of an early version of diffusers, with keys that none knows: much for libraries to say."""
    source = tiny.save("StableDiffusionPipeline", tmp_path / "model")
    old = {"_diffusers_version": "0.2.0", "unknown": 3}
    scheduler = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": True, **old}
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for path, more in (
        (source / "model_index.json", {"scheduler": ["diffusers", "PNDMScheduler"], "unknown": 3}),
        (source / "unet" / "config.json", old),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    few = {"trajectories": 1, "batch_size": 1, "noise_trajectories": 1}
    tree = tiny_config(source, calibration=few, model__dtype="bfloat16")
    tree["sampling"] |= {"scheduler": "plms", "steps": 1, "prompts": ["a red"], "image_size": 16}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def said(folder, *arguments, python=()):
    """Lines on standard error."""
    command = [sys.executable, *python, "-m", "qncd_cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_a_command_says_nothing_of_what_libraries_warn_of(folder):
    calibrate = ("calibrate", "--config", "tiny.yaml")
    lines = said(folder, *calibrate)
    assert [line for line in lines if not line.startswith("calibrating: ")] == []
    heard = said(folder, *calibrate, "--force", python=("-W", "default"))
    assert any("FutureWarning" in line for line in heard)  # there was something to be heard
