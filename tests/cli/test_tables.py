"""No name and no number is cut, whatever the width of the terminal."""

from __future__ import annotations

import io
import re

import click
import pytest

from qncd_cli.cli import tables
from qncd_cli.cli.main import cli
from qncd_cli.cli.tables import Grid

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
    listed = text.split()
    for name, command in cli.commands.items():
        summary = command.get_short_help_str(1000).split()
        at = listed.index(name) + 1
        assert listed[at : at + len(summary)] == summary


def test_a_plan_is_printed_in_full(qncd, width):
    report = qncd("calibrate", "--config", "tiny.yaml", "--plan", "--json").data
    text = qncd("calibrate", "--config", "tiny.yaml", "--plan").stdout
    tabled = text.partition(f"{report['samples']} samples")[0]
    whole(tabled, width, *[stage["stage"] for stage in report["stages"]])
    assert f"{report['coverage']['macs']:,}" in text
