"""The ablation on a tiny model: rows that share what they can, and go on where they stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Qncd, packaged, tiny_config
from PIL import Image

from qncd_cli.ablation.variants import variants
from qncd_cli.store.files import read_json

TABLE = Path("runs/ablate_tiny")
MEASURE = ("--num", "4", "--reference", "reference")
TWO = ("--presets", "minmax,minmax+ptqd", "--bits", "w8a8,w4a6")
ROW_KEYS = {
    "preset",
    "weights",
    "activations",
    "psnr_db",
    "sqnr_latents_db",
    "feature_distance_to_full",
    "feature_distance_to_reference",
    "class_agreement",
    "bytes",
    "bit_operations",
    "extra_calls",
    "seconds",
    "seconds_by_stage",
    "digests",
}


def quick(model: Path | str, **changes) -> dict:
    return tiny_config(
        model,
        sampling__steps=3,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights__rounding="nearest",
        quantization__activations__observer="minmax",
        **changes,
    )


def prepared(folder: Path, tree: dict) -> Qncd:
    runner = Qncd(folder)
    runner.write_config(tree)
    (folder / "reference").mkdir()
    for i in range(6):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(40 * i, 256, (16, 16), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / "reference" / f"{i}.png")
    return runner


def ablate(runner: Qncd, *arguments: str, ok: bool = True):
    return runner("ablate", "--config", "tiny.yaml", *MEASURE, *arguments, ok=ok)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory, tiny_model) -> Iterator[Qncd]:
    """Two variants at two widths. Do not change."""
    with packaged(tiny_model) as source:
        runner = prepared(tmp_path_factory.mktemp("ablated"), quick(source))
        runner.data = ablate(runner, *TWO, "--json").data
        yield runner


@pytest.fixture
def work(ablated, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(ablated.folder, tmp_path / "work"))


def row_files(runner: Qncd) -> dict[str, int]:
    """Everything that rows are made of, with the time at which it was last written."""
    folder = runner.folder / TABLE
    made = [p for p in folder.rglob("*") if p.is_file() and p.parent != folder]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in made}


def written(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Top folder/row or digest of every file that is new or newer."""
    changed = [name for name, time in after.items() if before.get(name) != time]
    return {"/".join(Path(name).parts[:2]).removesuffix(".json") for name in changed}


# ---- the table ----------------------------------------------------------------------------------


def test_every_row_is_measured_and_written(ablated):
    table = ablated.data
    names = [(r["preset"], r["weights"], r["activations"]) for r in table["rows"]]
    assert names == [(n, *b) for b in ((8, 8), (4, 6)) for n in ("minmax", "minmax+ptqd")]
    for row in table["rows"]:
        assert row.keys() >= ROW_KEYS
        for key in ("feature_distance_to_full", "feature_distance_to_reference"):
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
    assert table["protocol"]["num_samples"] == 4
    eight, four = table["rows"][0], table["rows"][2]
    assert eight["psnr_db"] > four["psnr_db"]
    assert eight["bytes"] > four["bytes"]
    assert table["full"]["bytes"] > eight["bytes"]
    assert eight["bit_operations"] > four["bit_operations"]
    stored = read_json(ablated.folder / TABLE / "ablation.json", "qncd ablate")
    assert stored == {k: v for k, v in table.items() if k != "run_dir"}


def test_rows_share_calibration_weights_and_full_precision(ablated):
    folder = ablated.folder / TABLE
    assert len(list((folder / "calibration").iterdir())) == 1
    assert len(list((folder / "quantized").iterdir())) == 2
    assert len(list((ablated.folder / "runs" / "full-precision").glob("*/manifest.json"))) == 1
    plain, corrected = ablated.data["rows"][:2]
    assert plain["digests"]["quantize"] == corrected["digests"]["quantize"]
    assert plain["psnr_db"] != corrected["psnr_db"]
    assert [r["reused"] for r in ablated.data["rows"]] == [
        [],
        ["calibrate", "quantize"],
        ["calibrate"],
        ["calibrate", "quantize"],
    ]


def test_a_row_is_what_the_four_commands_measure(work):
    options = ("--set", "quantization.preset=minmax", "--set", "quantization.weights.bits=8")
    work("calibrate", "--config", "tiny.yaml", *options)
    work("quantize")
    work("sample", "--num", "4")
    metrics = work("eval", "--fid", *MEASURE[2:], "--json").data
    row = json.loads((work.folder / TABLE / "ablation.json").read_text())["rows"][0]
    assert row["psnr_db"] == metrics["fidelity"]["psnr_db"]
    assert row["sqnr_latents_db"] == metrics["fidelity"]["sqnr_latents_db"]
    assert row["bytes"] == metrics["bytes"]["quantized"]
    found = row["feature_distance_to_reference"]["value"]
    assert found == metrics["quantized"]["feature_distance"]["value"]


def test_reports_name_every_row(ablated):
    folder = ablated.folder / TABLE
    for name in ("ablation.md", "ablation.html"):
        text = (folder / name).read_text()
        assert "full precision" in text
        assert text.count("minmax+ptqd") >= 2
        assert "random" not in text
    markdown = (folder / "ablation.md").read_text()
    assert sum(line.startswith("| minmax") for line in markdown.splitlines()) == 4
    for link in ("samples/minmax_w8a8_sheet.png", "samples/minmax+ptqd_w4a6_sheet.png"):
        assert link in (folder / "ablation.html").read_text()
        assert (folder / link).is_file()


def test_the_table_on_the_terminal(work):
    shown = ablate(work, *TWO).stdout
    assert "full precision" in shown
    assert shown.count("minmax+ptqd") >= 4, "pooled, and of single samples, at both widths"
    assert "ablation.html" in shown


# ---- going on -----------------------------------------------------------------------------------


def test_a_repeated_command_touches_no_row(work):
    before = row_files(work)
    again = ablate(work, *TWO, "--json").data
    assert row_files(work) == before
    stored = read_json(work.folder / TABLE / "ablation.json", "qncd ablate")
    assert again == stored | {"run_dir": again["run_dir"]}


def test_a_missing_row_alone_is_measured_again_from_what_is_there(work):
    name = "rows/minmax_w4a6.json"
    stored = json.loads((work.folder / TABLE / name).read_text())["row"]
    (work.folder / TABLE / name).unlink()
    before = row_files(work)
    ablate(work, *TWO)
    after = row_files(work)
    sheets = {n for n in written(before, after) if n.startswith("samples/minmax_w4a6_sheet")}
    assert written(before, after) == {"rows/minmax_w4a6"} | sheets
    again = json.loads((work.folder / TABLE / name).read_text())["row"]
    assert again["psnr_db"] == stored["psnr_db"]
    assert again["reused"] == ["calibrate", "quantize"]


def test_a_new_row_and_a_damaged_one(work):
    (work.folder / TABLE / "rows" / "minmax_w8a8.json").write_text("{")
    before = row_files(work)
    rows = ablate(work, "--presets", "minmax,minmax+affine", "--bits", "w8a8", "--json").data
    assert [r["preset"] for r in rows["rows"]] == ["minmax", "minmax+affine"]
    made = {n for n in written(before, row_files(work)) if n.startswith("rows")}
    assert made == {"rows/minmax_w8a8", "rows/minmax+affine_w8a8"}


def test_another_seed_or_number_makes_the_rows_anew(work):
    seeds = ("--set", "sampling.seed=3")
    one = ("--presets", "minmax", "--bits", "w8a8")
    row = ablate(work, *one, *seeds, "--json").data["rows"][0]
    before = json.loads((work.folder / TABLE / "rows" / "minmax_w8a8.json").read_text())["row"]
    assert row == before | {"sqnr_gain_db": None}
    fewer = ablate(work, *one, *seeds, "--num", "2", "--json").data
    assert fewer["protocol"]["num_samples"] == 2
    assert fewer["rows"][0]["psnr_db"] != row["psnr_db"]


def test_a_reference_that_changed_in_part_makes_the_rows_anew(work):
    statistics = {"mu": np.zeros(128), "sigma": np.eye(128)}
    images = np.stack([np.full((8, 8, 3), i, np.uint8) for i in range(4)])
    kept = ("--reference", "statistics.npz", "--presets", "minmax", "--bits", "w8a8", "--json")
    found = []
    for sigma, first in ((1, 0), (2, 0), (2, 9), (2, 9)):  # the last is the one before
        images[0] = first
        held = {**statistics, "sigma": sigma * statistics["sigma"], "arr_0": images}
        np.savez(work.folder / "statistics.npz", **held)
        before = row_files(work)
        (row,) = ablate(work, *kept).data["rows"]
        made = written(before, row_files(work))
        found.append(("rows/minmax_w8a8" in made, row["feature_distance_to_reference"]["value"]))
    assert [new for new, _ in found] == [True, True, True, False]
    assert found[0][1] != found[1][1] == found[2][1] == found[3][1]


def test_rows_tell_of_single_samples(ablated):
    for row in ablated.data["rows"]:
        psnr = list(row["per_seed"]["psnr_db"].values())
        assert row["psnr_median_db"] == pytest.approx(np.median(psnr))
        assert row["psnr_q05_db"] == pytest.approx(np.quantile(psnr, 0.05))
        assert row["sqnr_q05_db"] <= row["sqnr_median_db"]
        assert row["changed"] == sum(value < 20 for value in psnr)
    assert "changed" in (ablated.folder / TABLE / "ablation.md").read_text()


def test_force_measures_every_row_again(work):
    before = row_files(work)
    rows = ablate(work, *TWO[:2], "--bits", "w8a8", "--force", "--json").data["rows"]
    quantize = rows[0]["digests"]["quantize"]
    assert [r["reused"] for r in rows] == [[], ["calibrate", "quantize"]], "each stage once"
    after = row_files(work)
    before = {n: t for n, t in before.items() if not n.endswith("settings.json")}
    kept = {name for name, time in before.items() if after[name] == time}
    assert kept == {n for n in before if "w4a6" in n or n.startswith("quantized/")} - {
        n for n in before if n.startswith(f"quantized/{quantize}")
    }


# ---- variants -----------------------------------------------------------------------------------


def test_full_precision_in_the_place_of_the_quantized_model_changes_no_image(work):
    rows = ablate(work, "--presets", "both+none,qncd+runtime", "--bits", "fp", "--json").data
    plain, corrected = rows["rows"]
    assert (plain["weights"], plain["activations"]) == (32, 32)
    assert plain["identical_images"] is True
    assert plain["psnr_db"] is None
    assert corrected["extra_calls"] > 0
    assert corrected["identical_images"] is False
    assert "identical" in ablate(work, "--presets", "both+none", "--bits", "fp").stdout


def configs(tmp_path: Path, names: str, bits: str = "", *overrides: str, **more):
    path = tmp_path / "c.yaml"
    if not path.exists():
        path.write_text(json.dumps(quick(Path("nowhere"))))
    found = variants(str(path), names.split(","), [b for b in [bits] if b], overrides, **more)
    return [v.config for v in found]


def test_corrections_are_switched_on_the_same_weights(tmp_path):
    rows = configs(tmp_path, "none,intra,inter,both")
    found = [(c.correction.intra, c.correction.inter.method) for c in rows]
    assert found == [(a, b) for b in ("none", "ptqd") for a in ("none", "embedding")]
    assert len({c.quantization.model_dump_json() for c in rows}) == 1
    (runtime,) = configs(tmp_path, "none+runtime")
    assert runtime.correction.inter.method == "runtime"
    assert runtime.correction.inter.target == rows[3].correction.inter.target


def test_an_ingredient_changes_one_thing_and_wins(tmp_path):
    overrides = ("quantization.weights.rounding=adaround",)
    rows = configs(tmp_path, "best,best+nearest,best+bias,best+bias+auto", "", *overrides)
    trees = [c.to_dict() for c in rows]
    roundings = [tree["quantization"]["weights"].pop("rounding") for tree in trees]
    assert roundings == ["adaround", "nearest", "adaround", "adaround"]
    assert [tree["quantization"].pop("bias_correction") for tree in trees] == [False] * 2 + [
        True
    ] * 2
    assert [tree["correction"].pop("intra") for tree in trees] == ["none"] * 3 + ["auto"]
    assert all(tree == trees[0] for tree in trees)


def test_all_rows_are_quantized_alike_unless_published(tmp_path):
    (strict,) = configs(tmp_path, "qncd")
    assert strict.quantization.overrides == {}
    (published,) = configs(tmp_path, "qncd", published=True)
    assert published.quantization.overrides["*attentions*transformer_blocks*"].weights.bits == 32


def test_the_command_line_wins_over_the_presets(tmp_path):
    rows = configs(tmp_path, "minmax,qncd", "w4a8", "quantization.activations.observer=percentile")
    assert [c.quantization.activations.observer for c in rows] == ["percentile"] * 2
    assert [c.quantization.weights.rounding for c in rows] == ["nearest", "gptq"]


def test_what_a_preset_leaves_in_float_is_listed_with_its_name(qncd):
    options = (
        "--set",
        "quantization.preset=qncd-intra",
        "--set",
        "quantization.weights.rounding=nearest",
    )
    qncd("calibrate", "--config", "tiny.yaml", *options)
    qncd("quantize")
    coverage = json.loads((qncd.folder / "runs" / "tiny" / "coverage.json").read_text())
    why = {r["name"]: r["why_not_integer"] for r in coverage["layers"]}
    named = {name for name, text in why.items() if text == "left in float by preset qncd-intra"}
    assert named
    inside = {name for name in why if "attentions" in name and "transformer_blocks" in name}
    assert named == inside, "weights, inputs and both products of attention"
    assert {n.rpartition(".")[2] for n in named} >= {"to_q", "query_key", "probabilities_value"}
    assert any("attentions" in name and name.endswith("proj_in") for name in set(why) - named)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--presets", "qncd,minmx"), "did you mean minmax"),
        (("--presets", "qncd+filter"), "unknown +filter (known: none, runtime"),
        (("--presets", ""), "no row is named"),
        (("--bits", "w4a8,4x8"), "--bits 4x8"),
        (("--bits", "w4a16"), "--bits w4a32"),
        (("--bits", "w4a9"), "2 to 8 bits"),
        (("--set", "quantization.wieghts=3"), "did you mean"),
    ],
)
def test_a_bad_name_is_one_line_before_anything_runs(ablated, arguments, said):
    before = row_files(ablated)
    result = ablate(ablated, *arguments, ok=False)
    assert result.exit_code == 3
    (line,) = result.stderr.strip().splitlines()
    assert said in line
    assert row_files(ablated) == before
