"""Progress: bars at a terminal, few plain lines elsewhere, nothing for what is over at once."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

import diffusers_pipelines as tiny
import pytest
from conftest import Qncd, tiny_config
from PIL import Image

from qncd_cli.cli import progress
from qncd_cli.cli.console import Console
from qncd_cli.progress import counted, no_progress


def told(
    total: int, seconds_each: float, name: str = "rounding weights"
) -> list[tuple[float, str]]:
    """(time, line) of a loop of so many layers."""
    clock, said = [0.0], []

    def say(line: str) -> None:
        said.append((clock[0], line))

    for _ in progress.lines(range(total), name, total, "layers", say, lambda: clock[0]):
        clock[0] += seconds_each
    return said


def test_a_loop_that_ends_within_two_seconds_says_nothing():
    assert told(10, 0.19) == [] and told(1, 1.9) == []


def test_a_loop_of_65_seconds_says_so_twice_in_between_and_at_the_end():
    lines = told(130, 0.5)
    assert [round(at) for at, _ in lines] == [2, 32, 62, 65]
    assert lines[0][1] == "rounding weights: 4 of 130 layers, about 63 s left"
    assert lines[-1][1] == "rounding weights: 130 layers in 65 s"


def test_a_loop_of_hours_gives_a_line_each_half_minute():
    hours = told(6 * 360, 10.0)  # six hours
    assert [round(at) for at, _ in hours] == [10, *range(40, 6 * 3600, 30), 6 * 3600]
    minutes = told(100, 12.0)  # twenty minutes, in units of which three take longer
    assert [round(at) for at, _ in minutes] == [12, *range(48, 1200, 36), 1200]


def test_a_single_long_unit_is_told_when_it_has_ended():
    assert told(1, 7.0) == [(7.0, "rounding weights: 1 layers in 7 s")]


def test_what_comes_before_the_first_item_is_not_thought_to_come_again():
    clock, said = [100.0], []

    def items():
        clock[0] += 50  # as Hessians of many layers are collected before the first is rounded
        yield from range(100)

    for _ in progress.lines(
        items(), "rounding weights", 100, "layers", said.append, lambda: clock[0]
    ):
        clock[0] += 0.5
    assert said[0] == "rounding weights: 1 of 100 layers, about 50 s left"
    assert said[-1] == "rounding weights: 100 layers in 100 s"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Takes the place of stderr: a terminal of 80 columns that keeps what is written to it."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return _Terminal()


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_a_bar_counts_units_and_is_not_cut(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    track, description = Console().track, "measuring quantization noise"
    with redirect_stderr(terminal), redirect_stdout(io.StringIO()) as data:
        for _, tick in counted(track, range(2), description, 9998, "calls"):
            for _ in range(4999):
                tick()
            print("data")
    text = terminal.getvalue()
    assert description in text and "9998/9998 calls" in text and "left" in text
    assert "…" not in text and data.getvalue() == "data\ndata\n"


def test_a_loop_inside_of_another_has_a_bar_of_its_own(terminal, monkeypatch):
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    track = Console().track
    with redirect_stderr(terminal):
        for _ in track(range(2), "rounding weights", 2, "layers"):
            assert list(track(range(3), "collecting Hessians", 3, "calls")) == [0, 1, 2]
    last = terminal.getvalue().rpartition("rounding weights")[2]
    assert "2/2 layers" in last


def test_a_bar_of_a_loop_that_is_over_at_once_is_gone(terminal):
    with redirect_stderr(terminal):
        assert list(Console().track(range(3), "quick", 3, "layers")) == [0, 1, 2]
    after = terminal.getvalue().rpartition("left")[2]
    assert "\x1b[2K" in after and "\x1b[?25h" in after  # the line erased, the cursor back


def test_ticks_are_counted_and_items_are_not():
    seen = []

    def track(items, description, total, unit):
        for item in items:
            yield item
            seen.append((item, total, unit))

    for _, tick in counted(track, "ab", "sampling", 6, "calls"):
        for _ in range(3):
            tick()
    assert seen == [(i, 6, "calls") for i in range(6)]
    for _, tick in counted(no_progress, "a", "sampling", 1, "calls"):
        tick()
        tick()  # one more than was foreseen


def test_the_pipeline_counts_what_it_does(qncd, monkeypatch):
    """Every loop ends at the number that it announced, in units of calls, layers and images."""
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    images = qncd.folder / "tiny_images"
    images.mkdir()
    for seed in range(6):
        Image.new("L", (16, 16), 40 * seed).save(images / f"{seed}.png")
    told = {}
    for command in (
        ("calibrate", "--config", "tiny.yaml"),
        ("quantize", "--set", "correction.inter.method=stepwise"),
        ("sample", "--num", "6", "--batch-size", "4"),
        ("eval", "--images", "tiny_images", "--reference", "zoo", "--network", "fashion"),
    ):
        for line in qncd(*command).stderr.splitlines():
            name, _, rest = line.partition(": ")
            if " in " in rest:
                told[name] = rest.split(" in ")[0]
    assert told["calibrating"] == "8 calls"  # two batches of three, four steps
    assert told["choosing activation ranges"].endswith("layers")
    assert told["rounding weights"].endswith("layers")
    assert told["collecting Hessians"] == "4 calls"
    assert told["measuring quantization noise"] == "8 calls"
    assert told["sampling 6 images (quantized)"] == "10 calls"  # the decoder's two, too
    assert told["extracting features"] == "6 images"
    assert told["fitting the step-wise correction"] == "4 steps"


def test_encoding_prompts_counts_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    folder = tiny.save("StableDiffusionPipeline", tmp_path / "model")
    prompts = [f"shoe {number}" for number in range(20)]
    work = Qncd(tmp_path)
    work.write_config(tiny_config(folder, sampling__prompts=prompts, sampling__guidance_scale=2.0))
    told = work("calibrate", "--config", "tiny.yaml").stderr
    assert "encoding prompts: 20 prompts in" in told
