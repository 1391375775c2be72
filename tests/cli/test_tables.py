"""No name and no number is cut, whatever the width of the terminal."""

from __future__ import annotations

import io
import json
import re

import click
import pytest

from qncd_cli.ablation.rendering import cells
from qncd_cli.bench.rendering import KEYS
from qncd_cli.cli import bench, evaluation, tables
from qncd_cli.cli.console import Console
from qncd_cli.cli.main import cli
from qncd_cli.cli.tables import Grid
from qncd_cli.metrics import rows
from qncd_cli.report.page import Report, html_report
from qncd_cli.vocabulary import TERMS

WIDTHS = [60, 80, 120]
RUNS = ["full precision", "fashion_ldm_w8a8", "fashion_ldm_w4a8", "fashion_ldm_w4a6"]
NUMBERS = ["1.234 [1.012, 1.456]", "14.68", "28.21", "10,485,760", "14.6 %", "6.012", "0.9213"]
HEADINGS = [
    "to data ↓",
    "SQNR, dB ↑",
    "PSNR, dB ↑",
    "bytes",
    "of float32",
    "to full ↓",
    "as asked ↑",
]


def printed(grid: Grid, width: int) -> str:
    file = io.StringIO()
    tables.show(grid, width, file)
    return file.getvalue()


def words(text: str) -> list[str]:
    """What is printed, without frames, in the order of reading."""
    return re.sub(r"[┏━┓┃┡╇┩│└─┴┘┳]", " ", text).split()


def whole(text: str, width: int, *names: str) -> None:
    """Nothing is cut or folded, no line is too long, and every name stands on one line."""
    assert "…" not in text and "..." not in text
    assert max(map(len, text.splitlines())) <= width
    for name in names:
        assert any(name in line for line in text.splitlines()), name


def grid_of(count: int) -> Grid:
    rows = [[f"{RUNS[i % 4]}{'_again' * (i // 4)}", *NUMBERS] for i in range(count)]
    return Grid(["", *HEADINGS], rows, [False, *[True] * 7])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_names_and_numbers_are_whole(width, count):
    grid = grid_of(count)
    text = printed(grid, width)
    whole(text, width, *NUMBERS, *[row[0] for row in grid.rows])
    assert text.count("10,485,760") == count


def test_few_runs_become_columns_and_many_are_spread_over_several_tables():
    assert tables.arranged(grid_of(3), 200) == [grid_of(3)]
    (turned,) = tables.arranged(grid_of(2), 80) or []
    assert turned.columns == ["", *RUNS[:2]] and turned.rows[1][0] == "SQNR, dB ↑"
    parts = tables.arranged(grid_of(9), 80) or []
    assert len(parts) > 1 and all(part.columns[0] == "" for part in parts)
    assert [c for part in parts for c in part.columns[1:]] == HEADINGS


def test_all_columns_that_say_what_a_row_is_are_repeated():
    rows = [["qncd", bits, *NUMBERS] for bits in ("W8A8", "W4A8", "W4A6")] * 3
    grid = Grid(["variant", "bits", *HEADINGS], rows, [False, False, *[True] * 7], keys=2)
    parts = tables.arranged(grid, 60) or []
    assert len(parts) > 1
    assert all(list(part.columns[:2]) == ["variant", "bits"] for part in parts)


def test_what_is_too_wide_even_so_is_printed_in_blocks():
    name, source = "a" * 50, "models/" + "b" * 90 + ".ckpt"
    grid = Grid(["configuration", "model", "bits"], [[name, source, "W4A8"]] * 9, [False] * 3)
    lines = printed(grid, 80).splitlines()
    assert lines[:3] == [name, f"  model  {source}", "  bits   W4A8"]


def test_long_texts_are_wrapped_at_their_spaces():
    said = "ranges by the layer's output at every step, extra bits for the few layers that matter"
    text = printed(Grid(["preset", "what it is"], [["best", said]] * 9, [False] * 2), 60)
    whole(text, 60, "best")
    assert words(text)[4:].count("extra") == 9 and set(said.split()) <= set(words(text))


def test_what_looks_like_markup_is_printed_as_it_is():
    text = printed(Grid(["layer"], [["[bold]x[/bold]"]], [False]), 80)
    whole(text, 80, "[bold]x[/bold]")


# ---- the commands ------------------------------------------------------------------------------


@pytest.fixture(params=WIDTHS)
def width(request, monkeypatch) -> int:
    """Of the terminal."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_models_are_listed_in_full(qncd, width):
    found = qncd("models", "--json").data
    sources = [entry["model"] for entry in found["configs"].values()]
    whole(qncd("models").stdout, width, *found["configs"], *sources, *found["presets"])


def help_at(width: int, command: click.Command, name: str) -> str:
    options = {"terminal_width": width, "max_content_width": 100}
    return command.get_help(click.Context(command, info_name=name, **options))


@pytest.mark.parametrize("name", cli.commands)
def test_help_is_not_cut(width, name):
    text = help_at(width, cli.commands[name], name)
    assert "…" not in text and not re.search(r"[a-z]\.\.\.$", text, re.MULTILINE)
    assert max(map(len, text.partition("Options:")[0].splitlines())) <= width


def test_every_command_is_summed_up_in_full(width):
    text = help_at(width, cli, "qncd").partition("Commands:")[2].partition("The pipeline")[0]
    whole(text, width, *cli.commands)
    listed = " ".join(text.split())
    for name, command in cli.commands.items():
        assert f"{name} {' '.join(command.get_short_help_str(1000).split())}" in listed


@pytest.mark.parametrize(
    ("name", "terms"),
    [("eval", ["SQNR", "PSNR", "bits"]), ("calibrate", ["intra noise", "inter noise"])],
)
def test_help_has_a_sentence_for_what_a_newcomer_meets(name, terms):
    text = " ".join(help_at(80, cli.commands[name], name).split())
    assert all(f"{term}: {TERMS[term]}" in text for term in terms)


def test_a_plan_is_printed_in_full(qncd, width):
    report = qncd("calibrate", "--config", "tiny.yaml", "--plan", "--json").data
    text = qncd("calibrate", "--config", "tiny.yaml", "--plan").stdout
    tabled = text.partition(f"{report['samples']} samples")[0]
    whole(tabled, width, *[stage["stage"] for stage in report["stages"]])
    assert f"{report['coverage']['macs']:,}" in text


# ---- runs ---------------------------------------------------------------------------------------


def metrics_of(weights: int, psnr: float | None) -> dict:
    """A metrics.json in which every number is known."""
    entry = {"network": "fashion-classifier", "name": "fd_fashion", "value": 12.345}
    entry = {**entry, "low": 10.123, "high": 14.567}
    measured = {"feature_distance": entry, "class_agreement": 0.9213, "fid": None}
    decibels = ("sqnr_latents_db", "sqnr_median_db", "sqnr_q05_db", "psnr_median_db", "psnr_q05_db")
    fidelity = dict.fromkeys(decibels, 28.21) | {"psnr_db": psnr, "feature_distance": entry}
    fidelity |= {"ssim": 0.987, "ssim_median": 0.991, "ssim_q05": 0.912}
    fidelity |= dict.fromkeys(("cvvdp_jod", "cvvdp_jod_median", "cvvdp_jod_q05"))
    made = {"preset": "best", "weights": weights, "activations": 8, "bit_operations": 10**12}
    protocol = {"num_samples": 300, "network": "fashion-classifier"}
    return {
        "protocol": protocol,
        "full": measured,
        "quantized": measured,
        "fidelity": {**fidelity, "changed": 3, "per_seed": {}},
        "bytes": {"full": 43_440_000, "quantized": 1_000_000 * weights + 321_000},
        "quantization": {**made, "mean_weight_bits": 5.87, "mean_input_bits": 9.13},
    }


def test_runs_are_compared_in_full(qncd, width):
    names = ["fashion_ldm_w8a8", "fashion_ldm_w4a8", "fashion_ldm_w4a6_of_a_long_name"]
    for name, bits in zip(names, (8, 4, 2), strict=True):
        folder = qncd.folder / "runs" / name
        folder.mkdir(parents=True)
        psnr = None if bits == 8 else 31.87
        (folder / "metrics.json").write_text(json.dumps(metrics_of(bits, psnr)))
    folders = [f"runs/{name}" for name in names]
    text = qncd("compare", *folders).stdout
    whole(text, width, "full precision", *names, "W4A8 (5.9 / 9.1)", "31.87", "92.1", "identical")
    assert "visible quality" not in text  # which nobody measured
    assert "43.44" in text and "4.321" in text and "9.9" in text  # MB, and % of float32
    rows = qncd("compare", *folders, "--json").data["rows"]
    assert rows[2]["share_of_float32"] == 4_321_000 / 43_440_000
    assert rows[1]["mean_input_bits"] == 9.13 and "weights" not in rows[0]


def test_what_eval_prints_is_whole_and_in_the_words_of_the_report(width, capsys):
    metrics = metrics_of(4, 31.87)
    evaluation.render(Console(), metrics, "300 samples, same seeds")
    text = capsys.readouterr().out
    whole(text, width, "12.35 [10.12, 14.57]", "W4A8 (5.9 / 9.1)", "SQNR, worst 5 %, dB ↑")
    report = html_report(Report(metrics, "t")).replace("\u00a0", " ")
    for row in rows.rows(metrics):
        assert row.label in report and set(row.label.split()) <= set(words(text))
    assert "SQNR: Signal" in text and "Signal to quantization noise ratio" in report


def test_an_ablation_is_printed_whole(width, capsys):
    row = {**metrics_of(4, None)["fidelity"], "preset": "best+brecq", "weights": 4}
    entry = {"value": 12.345, "low": 10.123, "high": 14.567}
    row |= {"activations": 8, "mean_weight_bits": 5.87, "mean_input_bits": 9.13, "changed": 3}
    row |= {"identical_images": True, "identical_latents": False, "class_agreement": 0.9213}
    row |= {"feature_distance_to_full": entry, "feature_distance_to_reference": entry}
    row |= {"bytes": 4_321_000, "bit_operations": 10**12, "extra_calls": 4, "seconds": 65.4}
    full = {"feature_distance_to_reference": entry, "class_agreement": 1.0, "bytes": 43_440_000}
    lines = cells({"full": full, "rows": [row] * 12})
    Console().table(list(lines[0]), [list(line.values()) for line in lines], keys=2)
    text = capsys.readouterr().out
    whole(
        text, width, "best+brecq", "W4A8 (5.9 / 9.1)", "12.35 [10.12, 14.57]", "identical", "1,000"
    )


def test_a_bench_is_printed_whole(width, capsys):
    names = ["float32-eager", "bfloat16-compiled", "int8-w4a8-compiled"]
    numbers = dict.fromkeys(KEYS, 1234.567) | {"peak_bytes": 1_234_567_890}
    shares = {"convolution": 0.61234, "other": 0.38766}
    report = {
        "rows": [{"name": name, **numbers} for name in names],
        "profile": {name: {"shares": shares} for name in names},
    }
    bench.tables(Console(), report)
    whole(capsys.readouterr().out, width, *names, "1,235", "61.23", "convolution")
