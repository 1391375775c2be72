"""Presets fill what nobody has set, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qncd_cli.config.loading import load_config
from qncd_cli.config.presets import PRESETS, merged
from qncd_cli.config.schema import Config
from qncd_cli.errors import ConfigError

NAMES = [
    "minmax",
    "qdiffusion",
    "ptqd",
    "tdq",
    "qncd-intra",
    "qncd-inter",
    "qncd",
    "best",
    "best-label",
]


def read(tmp_path: Path, tree: dict, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"source": "zoo:fashion-ldm"}, **tree}))
    return load_config(str(path), overrides)


def preset(name: str, **more) -> dict:
    return {"quantization": {"preset": name, **more}}


def test_the_presets_are_those_of_the_method():
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_makes_a_valid_configuration_that_keeps_its_name(tmp_path, name):
    config = read(tmp_path, preset(name))
    assert config.quantization.preset == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strict", [False, True])
def test_a_resolved_configuration_reads_as_itself(tmp_path, name, strict):
    pattern = {"mid_block.*": {"weights": {"bits": 8}}}
    config = read(tmp_path, preset(name, strict=strict, overrides=pattern))
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    again = load_config(str(path))
    assert again == config
    assert list(again.quantization.overrides) == list(config.quantization.overrides)


def test_minmax_is_the_floor(tmp_path):
    config = read(tmp_path, preset("minmax"))
    assert config.quantization.weights.rounding == "nearest"
    assert config.quantization.activations.observer == "minmax"
    assert config.correction.intra == "none"
    assert config.correction.inter.method == "none"


def test_qncd_is_both_corrections_as_published_on_the_weights_of_qdiffusion(tmp_path):
    plain, both = read(tmp_path, preset("qdiffusion")), read(tmp_path, preset("qncd"))
    assert both.quantization.weights == plain.quantization.weights
    assert both.quantization.activations == plain.quantization.activations
    assert (both.correction.intra, plain.correction.intra) == ("embedding", "none")
    inter = both.correction.inter
    found = (inter.method, inter.target, inter.granularity, inter.baseline)
    assert found == ("runtime", "injected", "batch", "none")
    assert (inter.first, inter.interval, inter.repeat) == (6, 10, True), "steps 7, 17, 27, from 1"


@pytest.mark.parametrize(("steps", "first"), [(50, 6), (12, 6), (10, 5), (3, 1), (1, 0)])
def test_a_sampler_of_few_steps_gets_its_estimate_halfway(tmp_path, steps, first):
    tree = {**preset("qncd-inter"), "sampling": {"steps": steps}}
    assert read(tmp_path, tree).correction.inter.first == first


def test_a_preset_is_its_keys_written_out(tmp_path):
    for name, found in PRESETS.items():
        spelt = read(tmp_path, found.settings).to_dict()
        named = read(tmp_path, preset(name, strict=True)).to_dict()
        for tree in (spelt, named):
            del tree["quantization"]["preset"], tree["quantization"]["strict"]
        assert named == spelt, name


def test_a_key_of_the_file_wins_over_the_preset_of_the_file(tmp_path):
    config = read(tmp_path, preset("minmax", weights={"rounding": "gptq", "bits": 8}))
    assert config.quantization.weights.rounding == "gptq"
    assert config.quantization.weights.bits == 8
    assert config.quantization.activations.observer == "minmax"


def test_a_preset_of_the_command_line_wins_over_the_file_and_a_key_beside_it_over_both(tmp_path):
    tree = merged(preset("qncd", weights={"rounding": "gptq", "bits": 8}), {})
    tree["correction"] = {"inter": {"method": "affine", "interval": 3}}
    one = read(tmp_path, tree, "quantization.preset=minmax")
    assert one.quantization.weights.rounding == "nearest"
    assert one.quantization.weights.bits == 8, "widths are no preset's"
    assert one.correction.inter.method == "none"
    two = read(tmp_path, tree, "correction.intra=auto", "quantization.preset=minmax")
    assert two.correction.intra == "auto"


def test_another_preset_on_a_resolved_configuration_leaves_nothing_of_the_first(tmp_path):
    first = yaml.safe_load(read(tmp_path, preset("qncd")).to_yaml())
    second = read(tmp_path, first, "quantization.preset=ptqd")
    assert second == read(tmp_path, preset("ptqd"))
    assert second != read(tmp_path, preset("qncd"))


def test_exclusions_come_before_the_own_overrides_and_strict_drops_them(tmp_path):
    own = {"mid_block.attentions.*": {"activations": {"bits": 4}}}
    config = read(tmp_path, preset("qncd", overrides=own))
    assert list(config.quantization.overrides) == ["*attentions*transformer_blocks*", *own]
    assert config.quantization.overrides["*attentions*transformer_blocks*"].weights.bits == 32
    strict = read(tmp_path, preset("qncd", overrides=own, strict=True))
    assert list(strict.quantization.overrides) == list(own)
    resolved = yaml.safe_load(config.to_yaml())
    later = read(tmp_path, resolved, "quantization.strict=true")
    assert list(later.quantization.overrides) == list(own)
    assert later == strict


def test_a_time_grouped_preset_has_no_more_groups_than_steps(tmp_path):
    assert read(tmp_path, preset("tdq")).quantization.activations.timestep_groups == 5
    few = read(tmp_path, {**preset("tdq"), "sampling": {"steps": 4}})
    assert few.quantization.activations.timestep_groups == 4


def test_the_name_alone_makes_no_other_artifact(tmp_path):
    plain = read(tmp_path, PRESETS["best"].settings)
    named = read(tmp_path, preset("best", strict=True))
    for stage in ("calibrate", "quantize"):
        assert plain.stage_digest(stage) == named.stage_digest(stage)


def test_an_unknown_preset_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean minmax"):
        read(tmp_path, preset("min-max"))


def test_best_label_spends_no_bits_that_the_label_does_not_name(tmp_path):
    plain, best = read(tmp_path, preset("best-label")), read(tmp_path, preset("best"))
    label, spent = plain.quantization, best.quantization
    assert (label.sensitive.weight_bits, label.sensitive.activation_bits) == (0, 0)
    assert (spent.sensitive.weight_bits, spent.sensitive.activation_bits) == (0.6, 1.0)
    assert (label.first_last_bits, label.first_last_activation_bits) == (8, 8)
    assert (label.first_margin, spent.first_margin) == (1.3, 1.0)
    assert label.activations == spent.activations and label.weights == spent.weights
