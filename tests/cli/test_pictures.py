"""Pictures in half-blocks, and where --show draws them."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from conftest import Qncd
from PIL import Image
from rich.console import Console

from qncd_cli.cli.pictures import half_blocks, show_picture


def colours(text: str) -> list[list[tuple[str, str]]]:
    """Upper and lower colour of every cell, line by line, from 24-bit escape codes."""
    cells = re.compile(r"\x1b\[38;2;([\d;]+);48;2;([\d;]+)m(▀+)")
    return [
        [(up, low) for up, low, run in cells.findall(line) for _ in run]
        for line in text.splitlines()
    ]


def drawn(image: Image.Image, width: int) -> list[list[tuple[str, str]]]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="truecolor")
    console.print(half_blocks(image, width))
    return [line for line in colours(file.getvalue()) if line]


def test_every_cell_shows_the_pixel_above_and_the_one_below() -> None:
    image = Image.new("RGB", (3, 4))
    image.putdata([(10 * i, i, 200 - i) for i in range(12)])
    lines = drawn(image, 80)
    assert len(lines) == 2 and all(len(line) == 3 for line in lines)
    assert lines[0][1] == ("10;1;199", "40;4;196")
    assert lines[1][2] == ("80;8;192", "110;11;189")


@pytest.mark.parametrize("width", [20, 80])
def test_a_wide_picture_is_made_as_wide_as_the_terminal(width) -> None:
    lines = drawn(Image.new("RGB", (400, 200), "red"), width)
    assert {len(line) for line in lines} == {width} and len(lines) == width // 4


def colourful(monkeypatch) -> None:
    """As in a terminal with all colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")


def test_a_tall_sheet_is_shown_from_its_top(tmp_path, capsys, monkeypatch) -> None:
    colourful(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    sheet = Image.new("RGB", (40, 400), "blue")
    sheet.paste("red", (0, 0, 40, 32))
    sheet.save(tmp_path / "sheet.png")
    show_picture(tmp_path / "sheet.png")
    assert len(capsys.readouterr().out.splitlines()) == 16


def test_eval_and_sample_draw_their_sheets_and_say_what_they_always_say(
    sampled, tmp_path, monkeypatch
) -> None:
    work = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    plain = work("eval", "--show").stdout
    assert "no colours here to draw runs/tiny/pairs.png in" in plain and "▀" not in plain
    colourful(monkeypatch)
    shown = work("eval", "--show").stdout
    assert shown.count("▀") > 500 and "eval: unchanged" in shown
    first = " ".join(plain.split()).partition(". ")[0]
    assert first.startswith("tiny at W4A8 (no preset): 3.3 times smaller, median PSNR")
    assert (Path(work.folder) / "runs/tiny/pairs.png").is_file()
    assert "▀" not in work("eval").stdout and "▀" not in str(work("eval", "--show", "--json").data)
    assert work("sample", "--num", "6", "--batch-size", "4", "--show").stdout.count("▀") > 100
