"""The comparison with other tools: they are timed beside our rows, or listed with the reason."""

from __future__ import annotations

import json
import warnings

import bench_peers
import pytest
from click.testing import CliRunner
from conftest import SHALLOW, save_tiny_pipeline

pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_peers_are_timed_beside_our_rows(tmp_path, monkeypatch):
    save_tiny_pipeline(tmp_path / "model", **SHALLOW)

    def broken(denoiser, inputs, folder):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(bench_peers.PEERS, "broken", broken)
    asked = ["--rows", "float32-eager,int8-w4a8", "--peers", "onnxruntime,broken", "--rounds", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        result = CliRunner().invoke(
            bench_peers.main, [str(tmp_path / "model"), *asked, "--out", str(tmp_path)]
        )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["float32-eager", "int8-w4a8", "onnxruntime"]
    assert len(rows["onnxruntime"]["seconds"]) == 2
    assert rows["onnxruntime"]["disk_bytes"] is None
    assert report["unavailable"] == {"broken": "RuntimeError: no such kernel"}
    assert "broken: not measured: RuntimeError: no such kernel" in result.output
    assert "| onnxruntime |" in (tmp_path / "bench.md").read_text()
