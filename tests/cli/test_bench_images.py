"""The command bench --image on a tiny model: rows, parts, fidelity, bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import Qncd, tiny_config

from qncd_cli.backends.int8 import why_unavailable
from qncd_cli.bench.images import PARTS
from qncd_cli.store.files import read_json

NO_INT8 = why_unavailable(torch.device("cpu"))
ROWS = (
    "float32-eager,bfloat16-eager,int8,int8-reuse,int8-bfloat16-reuse,int8-reuse-decoder,"
    "int8-decoder,nncf"
)
pytestmark = pytest.mark.skipif(bool(NO_INT8), reason=NO_INT8)


@pytest.fixture(scope="module")
def benched(tmp_path_factory, tiny_model) -> Qncd:
    """A run with a plan of reuse and no decoder, and what the bench says of it. Do not change."""
    runner = Qncd(tmp_path_factory.mktemp("images"))
    tree = tiny_config(
        tiny_model,
        sampling__steps=4,
        sampling__reuse=0.6,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 8, "rounding": "nearest"},
        quantization__activations__observer="minmax",
        correction={"intra": "none", "inter": {"method": "none"}},
    )
    runner.write_config(tree)
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    asked = ("--rows", ROWS, "--batch-sizes", "2,1", "--rounds", "2", "--num", "3", "--no-memory")
    runner.data = runner("bench", "--image", *asked, "--out", "made", "--json").data
    return runner


def test_every_row_has_its_parts_and_they_make_up_an_image(benched):
    rows = benched.data["rows"]
    names = ["float32-eager", "bfloat16-eager", "int8", "int8-reuse", "int8-bfloat16-reuse"]
    assert [(r["name"], r["batch_size"]) for r in rows] == [(n, b) for b in (2, 1) for n in names]
    for row in rows:
        assert row["parts"].keys() == {*PARTS}
        assert row["parts"]["steps"] > 0 and row["parts"]["decoder"] > 0 and row["parts"]["png"] > 0
        assert row["parts"]["text"] < 1e-3  # it has none
        assert len(row["seconds"]) == 2 and row["peak_bytes"] is None
    corrected = {row["name"]: row["parts"]["correction"] for row in rows}
    assert corrected["int8-reuse"] > 0 == corrected["int8"]  # terms of the reuse plan


def test_no_row_buys_speed_with_pictures(benched):
    rows = {row["name"]: row for row in benched.data["rows"]}
    assert rows["float32-eager"]["psnr_db"] is None and rows["float32-eager"]["speedup"] == 1
    quality = [row["sqnr_latents_db"] for name, row in rows.items() if name != "float32-eager"]
    assert all(20 < decibels < 100 for decibels in quality) and len({*quality}) == 4
    assert rows["int8"]["psnr_db"] > 20


def test_what_cannot_be_drawn_is_listed_with_the_reason(benched):
    missing = benched.data["unavailable"]
    for name in ("int8-reuse-decoder", "int8-decoder"):
        assert missing[name].startswith("the run has no decoder in integers: qncd quantize --set")
    stored = read_json(benched.folder / "made/bench_image.json", "qncd bench")
    assert stored == {k: v for k, v in benched.data.items() if k != "out"}
    page = (benched.folder / "made/bench_image.md").read_text()
    assert "Batch 2:" in page and "| int8-reuse |" in page and "int8-decoder: not measured" in page


def test_memory_is_that_of_a_process_of_its_own(benched):
    asked = ("--rows", "float32-eager", "--batch-sizes", "1", "--rounds", "1", "--num", "1")
    (row,) = benched("bench", "--image", *asked, "--out", "one", "--json").data["rows"]
    assert 1e6 < row["peak_bytes"] < 2e9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", "int8-reus"), "did you mean int8-reuse?"),
        (("--rows", ","), "no row is named"),
        (("--batch-sizes", "1,x"), "--batch-sizes 1,x: no numbers from 1 on"),
        (("--batch-sizes", "0"), "--batch-sizes 0: no numbers from 1 on"),
        (("zoo:fashion-ldm",), "no SOURCE"),
        (("--run-dir", "elsewhere"), "elsewhere"),
    ],
)
def test_bad_input_is_one_line(benched, arguments, said):
    result = benched("bench", "--image", *arguments, ok=False)
    assert result.exit_code != 0 and said in result.stderr
    assert "Traceback" not in result.stderr
