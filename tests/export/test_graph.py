"""qncd export --to onnx and --to openvino: checked before anything is in its place."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import openvino
import pytest
from conftest import Qncd, save_tiny_dit_pipeline, tiny_config

from qncd_cli.backends import onednn


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Qncd:
    work = Qncd(tmp_path_factory.mktemp("export"))
    model = work.folder / "model"
    save_tiny_dit_pipeline(model, layers=1)  # tracing takes seconds a layer
    activations = {"bits": 8, "observer": "minmax", "timestep_groups": 4}
    changes = {"quantization__activations": activations, "correction__intra": "none"}
    changes |= {"quantization__weights": {"bits": 8, "rounding": "nearest"}}
    changes |= {"quantization__first_last_activation_bits": 16}
    work.write_config(tiny_config(model, **changes, correction__inter__method="none"))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    return work


def call(target, folder, index):
    """The prediction for zeros at the first timestep, by the runtime alone and from INDEX alone."""
    inputs = {
        name: np.zeros([2 if side == "batch" else side for side in said["shape"]], said["dtype"])
        for name, said in index["inputs"].items()
    }
    path = str(folder / index["file"])
    if target == "onnx":
        return onnxruntime.InferenceSession(path).run(None, inputs)[0]
    return openvino.Core().compile_model(path, "CPU")(inputs)[0]


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_graph_agrees_and_runs_by_itself(quantized, target):
    said = quantized("export", "--to", target, f"out-{target}", "--samples", "2", "--json").data
    folder = quantized.folder / f"out-{target}"
    index = json.loads((folder / "graph.json").read_text())
    assert said["products"] == index["products"]
    assert said["agreement"]["relative_difference"] < 0.05
    layers = {row["name"]: row for row in index["layers"]}
    assert index["cpus"] == "any"
    assert layers["transformer_blocks.0.attn1.to_q"]["integer_products"] == 2  # of 8-bit weights
    assert "VNNI" not in (folder / "README.md").read_text()
    assert all(
        bool(row["integer_products"]) != bool(row["why_not_integer"]) for row in layers.values()
    )
    integers = sum(row["integer_products"] for row in index["layers"])
    assert index["products"]["to_be_integer"] == index["products"]["integer_here"] == integers > 10
    assert call(target, folder, index).shape == (2, 3, 8, 8)
    lines = "\n".join([*said["python"], "print(prediction.shape)"])
    assert "\n".join(said["python"]) in (folder / "README.md").read_text()
    command = [sys.executable, "-c", lines]
    ran = subprocess.run(command, cwd=quantized.folder, capture_output=True, text=True, check=False)
    assert ran.stdout == "(1, 3, 8, 8)\n", ran.stderr


def test_a_graph_for_vnni_alone_has_one_product_of_8_bit_weights(quantized):
    asked = ("export", "--to", "onnx", "fast", "--samples", "1", "--cpus", "vnni")
    if onednn.saturates():
        refused = quantized(*asked, ok=False)
        assert refused.exit_code == 6
        assert "this CPU has no VNNI" in refused.stderr
        assert not (quantized.folder / "fast").exists()
        return
    quantized(*asked)
    index = json.loads((quantized.folder / "fast" / "graph.json").read_text())
    layers = {row["name"]: row for row in index["layers"]}
    assert index["cpus"] == "vnni"
    assert layers["transformer_blocks.0.attn1.to_q"]["integer_products"] == 1
    assert "Only CPUs with VNNI" in (quantized.folder / "fast" / "README.md").read_text()


def test_beyond_the_bound_nothing_is_written(quantized):
    before = sorted(quantized.folder.iterdir())
    refused = quantized("export", "--to", "onnx", "new", "--bound", "0", "--samples", "1", ok=False)
    assert refused.exit_code == 4
    assert "more than the bound" in refused.stderr
    assert sorted(quantized.folder.iterdir()) == before


def test_what_is_wrong_is_said_at_once(quantized, monkeypatch):
    (quantized.folder / "full").mkdir(exist_ok=True)
    (quantized.folder / "full" / "mine.txt").write_text("mine")
    full = quantized("export", "--to", "onnx", "full", "--force", ok=False)
    assert full.exit_code == 4
    assert "is not replaced" in full.stderr
    option = quantized("export", "--to", "diffusers", "new", "--bound", "1", ok=False)
    assert option.exit_code == 2
    cpus = quantized("export", "--to", "comfyui", "new", "--cpus", "any", ok=False)
    assert cpus.exit_code == 2
    assert "--cpus is for graphs" in cpus.stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = quantized("export", "--to", "onnx", "new", ok=False)
    assert missing.exit_code == 6
    assert "pip install onnx onnxscript onnxruntime" in missing.stderr
