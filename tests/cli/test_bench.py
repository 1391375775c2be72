"""The command bench on a tiny model: names and fields, files, bad input."""

from __future__ import annotations

import pytest
from conftest import Qncd

from qncd_cli.backends.int8 import SWITCH
from qncd_cli.store.files import read_json

ROW_KEYS = {
    "name",
    "seconds_per_call",
    "spread",
    "peak_bytes",
    "disk_bytes",
    "speedup",
    "roofline",
    "load_seconds",
    "prepare_seconds",
    "running_bytes",
}
QUICK = ("--rounds", "2", "--no-memory")


@pytest.fixture(scope="module")
def benched(tmp_path_factory, tiny_model) -> Qncd:
    """Full precision beside simulated rows, and what it printed as JSON. Do not change."""
    runner = Qncd(tmp_path_factory.mktemp("bench"))
    rows = "float32-eager,simulate-w4a8"
    runner.data = runner(
        "bench", tiny_model, "--rows", rows, *QUICK, "--out", "made", "--json"
    ).data
    return runner


def test_json_has_the_names_of_the_design(benched):
    rows = benched.data["rows"]
    assert [row["name"] for row in rows] == ["float32-eager", "simulate-w4a8"]
    for row in rows:
        assert row.keys() >= ROW_KEYS
    assert rows[0]["speedup"] == 1


def test_json_and_markdown_are_written(benched):
    folder = benched.folder / "made"
    assert sorted(p.name for p in folder.iterdir()) == ["bench.json", "bench.md"]
    stored = read_json(folder / "bench.json", "qncd bench")
    assert stored == {k: v for k, v in benched.data.items() if k != "out"}
    text = (folder / "bench.md").read_text()
    assert "| float32-eager |" in text
    assert "| simulate-w4a8 |" in text
    assert f"batch {benched.data['batch_size']}" in text


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("tiny.yaml", "tiny.yaml is a file"),
        ("tiny.yaml/deeper", "tiny.yaml is a file"),
        ("taken", "taken/bench.md: is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_looked_for(qncd, out, said):
    (qncd.folder / "taken" / "bench.md").mkdir(parents=True)
    result = qncd("bench", "./nowhere", "--out", out, ok=False)
    assert result.exit_code == 4
    (line,) = result.stderr.strip().splitlines()
    assert said in line


def test_a_configuration_names_the_model_and_a_missing_row_its_reason(qncd, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    rows = "float32-eager,int8-w4a8"
    result = qncd("bench", "--config", "tiny.yaml", "--rows", rows, *QUICK, "--profile")
    assert "float32-eager" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("int8-w4a8:")]
    assert f"switched off by {SWITCH}=1" in line
    assert "where the time goes" in result.stdout
    text = (qncd.folder / "runs" / "bench_tiny" / "bench.md").read_text()
    assert line in text
    assert "| attention products |" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "either SOURCE or --config"),
        (("model", "--config", "tiny.yaml"), 2, "either SOURCE or --config"),
        (("nowhere", "--rows", "float32-eager,int8-w4a9"), 3, "did you mean int8-w4a8?"),
        (("nowhere", "--rows", ","), 3, "no row is named"),
        (("./nowhere",), 5, "no such folder"),
        (("random:ldm5",), 5, "did you mean random:ldm4?"),
        (("model", "--rounds", "0"), 2, "--rounds"),
    ],
)
def test_bad_input_is_one_line(qncd, arguments, code, said):
    result = qncd("bench", *arguments, ok=False)
    assert result.exit_code == code
    (line,) = result.stderr.strip().splitlines()
    assert said in line
    assert not (qncd.folder / "runs").exists()
