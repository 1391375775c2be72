"""What the model card of an exported folder says, and where it has it from."""

from __future__ import annotations

import json

import yaml
from conftest import tiny_config

from qncd_cli.cli import model_card
from qncd_cli.cli.model_card import Source, card_text, source_of
from qncd_cli.config.loading import parse_config
from qncd_cli.store.files import write_sealed_json
from qncd_cli.store.run_dir import COVERAGE_KEYS, RunDir
from qncd_cli.vocabulary import said

LINES = ["import qncd_cli.exported", "pipeline = ..."]
KNOWN = {"mean_weight_bits": 5.9, "mean_input_bits": 9.1, "rest_bytes": 500_000}
KNOWN |= {"float_denoiser_bytes": 6_000_000}


def card(tmp_path, source=None, metrics=None, **changes) -> tuple[dict, str]:
    """The head of the card as YAML, and the rest."""
    run = RunDir(tmp_path)
    coverage = {key: KNOWN.get(key, kind()) for key, kind in COVERAGE_KEYS.items()}
    write_sealed_json(run.coverage, coverage)
    run.tensors("quantized").write_bytes(bytes(1_000_000))
    if metrics is not None:
        write_sealed_json(run.metrics, metrics)
    config = parse_config(tiny_config("models/mine", **changes), "test")
    text = card_text(config, run, "abc", "LDMPipeline", LINES, source or Source())
    _, head, rest = text.split("---\n", 2)
    return yaml.safe_load(head), rest


def metrics(artifact: str) -> dict:
    protocol = {"artifact": artifact, "num_samples": 64, "sampling": {"steps": 20}}
    return {"protocol": protocol, "fidelity": {"psnr_db": 31.25}}


def test_bits_size_and_psnr_are_those_of_the_run(tmp_path):
    head, text = card(tmp_path, metrics=metrics("abc"))
    assert head["tags"] == ["quantized", "qncd", "w4a8"]
    assert "W4A8 (5.9 / 9.1)" in text
    assert "1.500 MB, 25.0 % of float32" in text
    assert f"{said('psnr_db', 31.25)} over 64 samples of 20 steps" in text
    assert "```python\nimport qncd_cli.exported\n" in text
    assert "the correction `ptqd`" in text


def test_numbers_of_another_artifact_are_not_taken(tmp_path):
    assert "not measured" in card(tmp_path, metrics=metrics("of another"))[1]
    assert "not measured" in card(tmp_path)[1]


def test_base_model_and_licence_are_the_sources(tmp_path):
    source = Source("org/model", {"license": "other", "license_name": "x: y", "tags": ["a"]})
    head, text = card(tmp_path, source)
    assert head["base_model"] == "org/model"
    assert head["base_model_relation"] == "quantized"
    assert (head["license"], head["license_name"]) == ("other", "x: y")
    assert "# org/model, W4A8" in text
    head, text = card(tmp_path)
    assert not {"license", "base_model"} & head.keys()
    assert "not said by the model" in text


def test_a_folder_says_where_it_is_from(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(json.dumps({"_name_or_path": "org/base"}))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\ntext\n")
    (tmp_path / "LICENSE.md").write_text("text")
    found = source_of(str(tmp_path))
    assert found == Source("org/base", {"license": "mit"}, [tmp_path / "LICENSE.md"])
    for damaged in ("", "---\n: : :\n---\n", "---\n- a\n---\n", "# no head\nlicense: mit\n"):
        (tmp_path / "README.md").write_text(damaged)
        assert source_of(str(tmp_path)).card == {}
    monkeypatch.setattr(model_card, "folder_of", lambda source: None)
    assert source_of("org/elsewhere").base == "org/elsewhere"
    assert source_of("random:sd15").base is None
