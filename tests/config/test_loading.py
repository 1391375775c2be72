"""Reading configurations: refused in words that help, overridden, inert."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from qncd_cli.config.loading import load_config, parse_config
from qncd_cli.errors import ConfigError

# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "wrong", "meant"),
    [
        ("modle.source=x", "modle", "model"),
        ("sampling.stepz=5", "sampling.stepz", "sampling.steps"),
        ("quantization.weights.bit=4", "quantization.weights.bit", "quantization.weights.bits"),
        ("correction.inter.methd=none", "correction.inter.methd", "correction.inter.method"),
        (
            "quantization.overrides={'mid.*': {weigths: {bits: 8}}}",
            "quantization.overrides.mid.*.weigths",
            "quantization.overrides.mid.*.weights",
        ),
        (
            "quantization.overrides={'mid.*': {activations: {observr: mse}}}",
            "quantization.overrides.mid.*.activations.observr",
            "quantization.overrides.mid.*.activations.observer",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(minimal, override, wrong, meant):
    assert f"unknown key {wrong}, did you mean {meant}?" in refused(minimal, override)


def test_an_unknown_key_like_no_other_gets_the_list_of_its_section(minimal):
    line = refused(minimal, "calibration.zzzzz=1")
    assert "unknown key calibration.zzzzz (known: effort, trajectories," in line


def test_messages_name_keys_that_the_user_can_write(minimal):
    """No 'literal[...]' or 'tuple[...]' of the validator in a dotted path."""
    line = refused(minimal, "sampling.classes=[1, x]")
    assert "literal[" not in line
    assert "tuple[" not in line


def test_all_offenders_are_listed_in_one_error_with_the_file(minimal):
    line = refused(
        minimal, "sampling.stepz=5", "sampling.eta=2", "foo=1", "quantization.weights.bits=99"
    )
    assert minimal in line
    for key in ("sampling.stepz", "sampling.eta", "foo", "quantization.weights.bits"):
        assert key in line


def test_the_model_is_required():
    with pytest.raises(ConfigError, match=r"here: missing key model\.source"):
        parse_config({"model": {}}, "here")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "a: [1", "\tmodel: x", "1: 2\n"])
def test_files_that_are_no_mapping_of_options_are_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert str(path) in refused(str(path))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read" in refused(str(path))


# ---- --set --------------------------------------------------------------------------------------


def test_overrides_reach_every_depth_and_read_yaml_values(minimal):
    config = load_config(
        minimal,
        [
            "sampling.steps=7",
            "sampling.classes=[3, 1]",
            "correction.inter.method=affine",
            "quantization.weights.bits=8",
            "quantization.cache_time_embeddings=false",
            "model.source=a=b",
        ],
    )
    assert config.sampling.steps == 7
    assert config.sampling.classes == (3, 1)
    assert config.correction.inter.method == "affine"
    assert config.quantization.weights.bits == 8
    assert config.quantization.cache_time_embeddings is False
    assert config.model.source == "a=b"


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: {source: m}\nsampling:\n  steps: 20\n  eta: 0\n  steps: 50\n")
    assert "line 5: the key steps stands there again" in refused(str(path))


def test_the_last_of_two_overrides_wins_and_neighbours_stay(minimal):
    config = load_config(minimal, ["sampling.steps=7", "sampling.eta=0.5", "sampling.steps=9"])
    assert (config.sampling.steps, config.sampling.eta) == (9, 0.5)
    assert config.sampling.guidance_scale == 3.0


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("sampling.steps", "--set sampling.steps: expected key.path=value"),
        ("=5", "--set =5: expected key.path=value"),
        ("sampling.steps={", "--set sampling.steps={: the value is not valid YAML"),
        ("model.source.deeper=1", "model.source has no keys below"),
        ("sampling..steps=1", "unknown key sampling."),
        ("sampling.classes.0=1", "sampling.classes: "),
    ],
)
def test_a_bad_override_is_refused_with_its_own_text(minimal, override, text):
    assert text in refused(minimal, override)


def test_layer_patterns_change_only_what_they_name(minimal):
    override = "quantization.overrides={'mid_block.*': {weights: {bits: 8}}, conv_in: {}}"
    overrides = load_config(minimal, [override]).quantization.overrides
    assert overrides["mid_block.*"].weights.bits == 8
    assert overrides["mid_block.*"].activations.bits is None
    assert overrides["conv_in"].weights.bits is None


# ---- inert --------------------------------------------------------------------------------------


def test_reading_imports_no_torch():
    code = (
        "import sys, qncd_cli.config.loading as c\n"
        "from qncd_cli.config.shipped import shipped_configs\n"
        "for name in shipped_configs(): c.load_config(name).stage_digest('quantize')\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_reading_does_not_look_for_the_model(minimal):
    config = load_config(minimal, ["model.source=/no/such/folder"])
    assert config.model.source == "/no/such/folder"
    assert not Path(config.model.source).exists()
