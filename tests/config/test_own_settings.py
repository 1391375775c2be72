"""What a configuration leaves out comes from the model; where models and prompts are looked for."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import refused

from qncd_cli.config import model_card
from qncd_cli.config.loading import load_config
from qncd_cli.errors import ConfigError


def fake_folder(folder: Path, kind: str, scheduler: dict | None = None, **parts: dict) -> Path:
    """The small files of a pipeline's folder, no weights."""
    own = {"_class_name": "DDIMScheduler"} if scheduler is None else scheduler
    index = {"_class_name": kind, "scheduler": ["diffusers", own.get("_class_name", "")]}
    for name, tree in {"scheduler/scheduler_config": own, "model_index": index, **parts}.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree))
    return folder


def configured(tmp_path: Path, source: object, **sampling: object) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"model": {"source": str(source)}, "sampling": sampling}))
    return str(path)


# ---- the model's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(model_card.PIPELINES))
def test_steps_and_guidance_are_the_defaults_of_the_pipeline(kind):
    import diffusers

    from qncd_cli.models.adapters import ADAPTERS
    from qncd_cli.models.pipelines import CLASS_CONDITIONAL

    assert set(model_card.PIPELINES) == set(ADAPTERS)
    steps, guidance, _ = model_card.PIPELINES[kind]
    loaded = CLASS_CONDITIONAL.get(kind) or getattr(diffusers, kind)
    parameters = inspect.signature(loaded.__call__).parameters
    assert parameters["num_inference_steps"].default == steps
    assert (parameters["guidance_scale"].default if "guidance_scale" in parameters else 1) == (
        guidance
    )


def test_every_short_name_of_a_scheduler_is_one_that_sampling_takes():
    from qncd_cli.sampling.samplers import SCHEDULERS

    for kind, short in model_card._SCHEDULERS.items():
        assert SCHEDULERS[short][0] == kind


@pytest.mark.parametrize(
    ("kind", "scheduler", "expected"),
    [
        (
            "StableDiffusionPipeline",
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
            ("plms", 50, 7.5),
        ),
        ("StableDiffusionXLPipeline", {"_class_name": "EulerDiscreteScheduler"}, ("euler", 50, 5)),
        ("DDPMPipeline", {"_class_name": "DDPMScheduler"}, ("ddpm", 1000, 1)),
        (
            "FluxPipeline",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            ("flow-euler", 28, 1),  # no guidance_embeds: schnell
        ),
    ],
)
def test_scheduler_steps_and_guidance_are_the_models_own(tmp_path, kind, scheduler, expected):
    folder = fake_folder(tmp_path / "model", kind, scheduler)
    sampling = load_config(configured(tmp_path, folder, prompts=["x"])).sampling
    assert (sampling.scheduler, sampling.steps, sampling.guidance_scale) == expected
    set_ones = load_config(
        configured(tmp_path, folder, prompts=["x"], steps=7), ["sampling.guidance_scale=null"]
    )
    assert set_ones.sampling.steps == 7
    assert set_ones.sampling.guidance_scale == expected[2]


def test_what_was_resolved_stays_when_the_model_is_gone(tmp_path):
    folder = fake_folder(tmp_path / "model", "DDIMPipeline")
    config = load_config(configured(tmp_path, folder))
    run = tmp_path / "config.yaml"
    run.write_text(config.to_yaml())
    (folder / "model_index.json").unlink()
    assert load_config(str(run)) == config


def test_a_scheduler_that_is_not_known_here_has_to_be_replaced_by_hand(tmp_path):
    folder = fake_folder(
        tmp_path / "model", "DDIMPipeline", {"_class_name": "DPMSolverSDEScheduler"}
    )
    path = configured(tmp_path, folder)
    assert "own scheduler, DPMSolverSDEScheduler, has no namesake here" in refused(path)
    assert load_config(path, ["sampling.scheduler=euler"]).sampling.steps == 50


def test_a_hub_id_that_is_not_here_is_not_given_another_models_settings(tmp_path):
    path = configured(tmp_path, "some-owner/some-model", steps=20)
    line = refused(path)
    assert "sampling.scheduler, sampling.guidance_scale would be the model's own" in line
    fetched: list[str] = []
    with pytest.raises(ConfigError, match="ended"):
        load_config(path, download=lambda source: (fetched.append(source), _end())[0])
    assert fetched == ["some-owner/some-model"]


def _end() -> None:
    raise ConfigError("ended")


def test_a_checkpoint_is_sampled_as_compvis_does(tmp_path):
    stage = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    beside = tmp_path / "v1.yaml"
    beside.write_text(yaml.safe_dump({"model": {"params": {"cond_stage_config": stage}}}))
    tree = {"model": {"source": str(tmp_path / "sd.ckpt"), "compvis_config": "v1.yaml"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    assert "a text model" in refused(str(tmp_path / "my.yaml"))
    config = load_config(str(tmp_path / "my.yaml"), ["sampling.prompts=[a red shoe]"])
    assert (config.sampling.steps, config.sampling.guidance_scale) == (50, 7.5)
    assert config.model.compvis_config == str(beside)


# ---- where paths lead ---------------------------------------------------------------------------


def test_a_relative_source_is_found_from_anywhere_later(tmp_path, monkeypatch):
    fake_folder(tmp_path / "models" / "mine", "DDIMPipeline")
    monkeypatch.chdir(tmp_path)
    config = load_config(configured(tmp_path, "models/mine"))
    assert config.model.source == str(tmp_path / "models" / "mine")


def test_a_relative_source_is_looked_for_beside_its_configuration(tmp_path, monkeypatch):
    fake_folder(tmp_path / "mine", "DDIMPipeline")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(configured(tmp_path, "mine"))
    assert config.model.source == str(tmp_path / "mine")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fake_folder(tmp_path / "models" / "mine", "DDIMPipeline")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config = load_config(
        configured(tmp_path, "~/models/mine"), ["sampling.prompts='~/prompts.txt'"]
    )
    assert config.model.source == str(tmp_path / "models" / "mine")
    assert config.sampling.prompts == ("a cat",)


@pytest.mark.parametrize("source", ["zoo:fashion-ldm", "random:sd15", "/no/such/folder", "mine"])
def test_other_sources_stay_as_they_are(tmp_path, source):
    assert load_config(configured(tmp_path, source)).model.source == source


# ---- prompts ------------------------------------------------------------------------------------

MARK = "\ufeff"


def prompts_in(tmp_path: Path, data: bytes) -> tuple[str, ...]:
    (tmp_path / "prompts.txt").write_bytes(data)
    return load_config(configured(tmp_path, "mine", prompts="prompts.txt")).sampling.prompts or ()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prompts_are_lines_and_a_byte_order_mark_is_none_of_them(tmp_path, end):
    text = end.join(["a red shoe", "", "a blue bag", ""])
    assert prompts_in(tmp_path, text.encode("utf-8-sig")) == ("a red shoe", "a blue bag")


@pytest.mark.parametrize("inside", ["\u0085", "\u2028", "\u2029", "\x0b", "\x1c"])
def test_other_separators_stay_inside_of_a_prompt(tmp_path, inside):
    text = f"a red{inside}shoe\na blue bag\n"
    assert prompts_in(tmp_path, text.encode()) == (f"a red{inside}shoe", "a blue bag")


def test_a_mark_between_two_files_in_one_is_no_part_of_a_prompt(tmp_path):
    assert prompts_in(tmp_path, f"a\n{MARK}b\n".encode()) == ("a", "b")


def test_a_mark_before_yaml_in_lists_and_on_the_command_line_is_left_out(tmp_path):
    tree = {"model": {"source": "mine"}, "sampling": {"prompts": [f"{MARK}a cat"]}}
    path = tmp_path / "my.yaml"
    path.write_bytes(MARK.encode() + yaml.safe_dump(tree, allow_unicode=True).encode())
    sampling = load_config(str(path), [f"sampling.negative_prompt={MARK}dog"]).sampling
    assert (sampling.prompts, sampling.negative_prompt) == (("a cat",), "dog")


def test_a_prompt_in_the_place_of_a_file_is_one_short_line(tmp_path):
    line = refused(configured(tmp_path, "mine", prompts="a very long prompt " * 40))
    assert "sampling.prompts: no file a very long" in line
    assert "a YAML list" in line
    assert len(line) < 300


def test_a_file_of_prompts_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a cat".encode("utf-16"))
    assert "a text file in UTF-8" in refused(configured(tmp_path, "mine", prompts="prompts.txt"))


# ---- defaults -----------------------------------------------------------------------------------


def test_a_configuration_without_a_preset_has_the_best_one(minimal, tmp_path):
    said = load_config(minimal).quantization
    assert (said.preset, said.activations.observer) == ("best", "output")
    none = load_config(minimal, ["quantization.preset=null"]).quantization
    assert (none.preset, none.activations.observer) == (None, "mse")


def test_fewer_trajectories_than_the_file_measures_noise_on_is_no_error(tmp_path):
    path = tmp_path / "my.yaml"
    tree = {"model": {"source": "mine"}, "calibration": {"noise_trajectories": 24}}
    path.write_text(yaml.safe_dump(tree))
    config = load_config(str(path), ["calibration.trajectories=8"])
    assert config.calibration.noise_trajectories == 8
    both = ["calibration.trajectories=8", "calibration.noise_trajectories=9"]
    assert "noise_trajectories cannot exceed" in refused(str(path), *both)


def test_asking_a_folder_imports_no_torch(tmp_path):
    folder = fake_folder(tmp_path / "model", "DDIMPipeline")
    code = (
        "import sys, qncd_cli.config.loading as c\n"
        f"c.load_config({configured(tmp_path, folder)!r})\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'rich') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy()
    )
    assert result.stdout.strip() == "[]", result.stderr


# ---- what is no configuration -------------------------------------------------------------------


def test_a_model_in_the_place_of_a_configuration_is_told_what_to_do(tmp_path):
    folder = fake_folder(tmp_path / "model", "DDIMPipeline")
    for model in (str(folder), "zoo:fashion-ldm", "model.ckpt"):
        line = refused(model)
        assert f"qncd run {model} --bits w4a8" in line
        assert f"qncd init {model}" in line


def test_a_run_in_the_place_of_a_configuration_names_its_file(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert f"--config {tmp_path / 'config.yaml'}" in refused(str(tmp_path))


def test_a_prompt_in_the_place_of_a_configuration_is_one_short_line():
    assert len(refused("an astronaut " * 50)) < 200
