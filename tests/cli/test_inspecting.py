"""inspect sums up whatever a run holds, and says of a run what is stale."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import Qncd

RUN = "runs/tiny"


@pytest.fixture
def work(tmp_path, sampled) -> Qncd:
    """A copy of a calibrated, quantized and sampled run."""
    shutil.copytree(sampled, tmp_path / "work")
    return Qncd(tmp_path / "work")


def states(work: Qncd) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in work("inspect", RUN, "--json").data["stages"]}


@pytest.mark.parametrize("kind", ["quantized", "calibration", "smoothing", "noise_stats"])
def test_an_artifact_is_summed_up_in_a_screenful(work, kind):
    path = f"{RUN}/{kind}.safetensors"
    text = work("inspect", path).stdout
    assert len(text.splitlines()) <= 25
    assert text.startswith(f"{path}: {kind}, ") and " MB, sound\n" in text
    found = work("inspect", path, "--json").data
    assert found["kind"] == kind and found["digest"][:16] in text
    for name, digest in found["parents"].items():
        assert f"made from {name}" in text and digest[:16] in text


def test_bits_and_bytes_of_a_quantized_model_add_up(work):
    path = f"{RUN}/quantized.safetensors"
    text = work("inspect", path).stdout
    (bits,) = [line for line in text.splitlines() if line.strip().startswith("weight bits")]
    layers = work("inspect", path, "--json").data["body"]["layers"]
    counts = {}
    for entry in layers.values():
        counts[entry["weight_bits"]] = counts.get(entry["weight_bits"], 0) + 1
    assert all(f"{value} in {count}" in bits for value, count in counts.items())
    assert "weight " in text and "weight_scale " in text


def test_tensors_are_listed_on_request_alone(work):
    path = f"{RUN}/quantized.safetensors"
    assert "conv_in.weight_scale" not in work("inspect", path).stdout
    assert "conv_in.weight_scale" in work("inspect", path, "--tensors").stdout


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("coverage.json", "coverage", "multiplications"),
        ("samples/quantized/manifest.json", "sample set", "seeds"),
        ("config.yaml", "configuration", "sampler"),
    ],
)
def test_other_files_of_a_run_are_no_truncated_artifacts(work, name, kind, words):
    text = work("inspect", f"{RUN}/{name}").stdout
    assert kind in text.splitlines()[0] and words in text
    assert work("inspect", f"{RUN}/{name}", "--json").data["kind"] == kind


def test_a_run_is_listed_with_its_stages(work):
    assert states(work) == {
        "calibrate": "holds",
        "quantize": "holds",
        "sample quantized": "6 images",
    }
    text = work("inspect", RUN).stdout
    assert "W4A8" in text and "calibrate" in text and "6 images" in text


def test_what_is_stale_is_said_with_the_reason(work):
    work("quantize", "--set", "quantization.weights.rounding=nearest")
    found = states(work)
    assert found["quantize"] == "holds"
    assert found["sample quantized"] == "6 images, stale: of another quantized model"
    config = work.folder / RUN / "config.yaml"
    config.write_text(config.read_text().replace("trajectories: 6", "trajectories: 5"))
    found = states(work)
    assert "calibration.trajectories" in found["calibrate"]
    assert found["quantize"] != "holds"


def test_damage_is_told_and_nothing_ends_in_a_traceback(work):
    path = work.folder / RUN / "quantized.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert "truncated" in states(work)["quantize"]
    refused = work("inspect", f"{RUN}/quantized.safetensors", ok=False)
    assert refused.exit_code == 4 and "truncated" in refused.stderr
    manifest = work.folder / RUN / "samples" / "quantized" / "manifest.json"
    manifest.write_text("[]")
    assert states(work)["sample quantized"] == "its manifest is damaged"


@pytest.mark.parametrize("name", ["nowhere", "nowhere.json", "nowhere.yaml", ".", "list.json"])
def test_what_is_of_no_run_is_refused_in_one_line(work, name):
    (work.folder / "list.json").write_text(json.dumps([1, 2]))
    refused = work("inspect", name, ok=False)
    assert refused.exit_code in (3, 4)
    assert len(refused.stderr.strip().splitlines()) == 1
