"""Options of sampling that a model or its scheduler cannot follow: one line, before any work."""

from __future__ import annotations

import json

import diffusers_pipelines as tiny
import pytest
from conftest import Qncd, ddim_scheduler, save_tiny_pipeline, tiny_config


def with_scheduler(folder, name, **config):
    """The folder's scheduler exchanged for another one."""
    own = {key: value for key, value in ddim_scheduler().config.items() if key[0] != "_"}
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**own, "_class_name": name, **config})
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))


def images(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def work(tmp_path):
    """The command line beside a copy of the tiny model in `model`."""
    save_tiny_pipeline(tmp_path / "model")
    runner = Qncd(tmp_path)
    runner.write_config(tiny_config(tmp_path / "model"))
    return runner


def test_guidance_0_keeps_the_prompt(tmp_path):
    """As --plan counts it: one row a sample."""
    work = Qncd(tmp_path)
    source = tiny.save("StableDiffusionPipeline", tmp_path / "model")
    few = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    work.write_config(
        tiny_config(
            source,
            calibration=few,
            sampling={"steps": 2, "guidance_scale": 0.0, "prompts": ["a red shoe", "a bag"]},
        )
    )
    off, on = (
        work("calibrate", "--config", "tiny.yaml", "--plan", "--json", "--set", scale).data
        for scale in ("sampling.guidance_scale=1", "sampling.guidance_scale=2")
    )
    plan = work("calibrate", "--config", "tiny.yaml", "--plan", "--json").data
    macs = [report["stages"][0]["macs"] for report in (plan, off, on)]
    assert macs[0] == macs[1] < macs[2]
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    for words in ("a red shoe", "a bag"):
        work("sample", "--num", "1", "--prompt", words, "--name", words[2:5])
    samples = next(tmp_path.glob("runs/*/samples"))
    assert images(samples / "red") != images(samples / "bag")


def test_guidance_0_of_a_class_conditional_model_says_what_it_draws(work):
    config = ("--config", "tiny.yaml", "--set", "sampling.guidance_scale=0")
    assert "every image is of the null class" in work("calibrate", *config).stderr


@pytest.mark.parametrize("scale", ["1e30", "101", "-0.5"])
def test_guidance_out_of_range_is_refused(work, scale):
    key = f"sampling.guidance_scale={scale}"
    refused = work("calibrate", "--config", "tiny.yaml", "--set", key, ok=False)
    assert refused.exit_code == 3
    assert "guidance_scale" in refused.stderr
    assert work("sample", "--guidance", scale, ok=False).exit_code == 2


@pytest.mark.parametrize(
    ("steps", "scheduler", "said"),
    [
        ("1000", "ddim", "DDIMScheduler takes no 1000 steps"),
        ("1000", "euler", "EulerDiscreteScheduler takes no 1000 steps"),
        ("2", "pndm", "PNDMScheduler takes no 2 steps"),
    ],
)
def test_steps_that_a_scheduler_cannot_take(work, steps, scheduler, said):
    keys = ("--set", f"sampling.steps={steps}", "--set", f"sampling.scheduler={scheduler}")
    for plan in ((), ("--plan",)):
        refused = work("calibrate", "--config", "tiny.yaml", *keys, *plan, ok=False)
        assert refused.exit_code == 3
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["SCMScheduler", "EDMEulerScheduler"])
def test_a_folder_with_another_schedule_is_refused(work, name):
    with_scheduler(work.folder / "model", name)
    for keys in ((), ("--set", "sampling.scheduler=euler")):
        refused = work("calibrate", "--config", "tiny.yaml", *keys, ok=False)
        again = work("calibrate", "--config", "tiny.yaml", *keys, "--plan", ok=False)
        assert refused.exit_code == again.exit_code == 3
        assert again.stderr == refused.stderr
        assert f"made for {name}" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_distilled_folder_is_named(work):
    with_scheduler(
        work.folder / "model", "EulerAncestralDiscreteScheduler", timestep_spacing="trailing"
    )
    keys = ("sampling.scheduler=euler", "correction.intra=none")
    said = work("calibrate", "--config", "tiny.yaml", "--set", keys[0], "--set", keys[1]).stderr
    assert "EulerAncestralDiscreteScheduler with trailing timesteps is that of distilled" in said


def test_an_existing_set_survives_a_refusal(sampled, tmp_path):
    import shutil

    work = Qncd(tmp_path / "copy")
    shutil.copytree(sampled, work.folder)
    folder = next(work.folder.glob("runs/*/samples/quantized"))
    before = images(folder)
    refused = work(
        "sample", "--steps", "1000", "--inter", "none", "--num", "6", "--force", ok=False
    )
    assert refused.exit_code == 3
    assert "1000 steps" in refused.stderr
    assert images(folder) == before
