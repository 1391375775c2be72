"""What the report takes from beside the run: a bench of this machine, commands that repeat it."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import Qncd

from qncd_cli import machine

RUN = Path("runs/tiny")


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(sampled, tmp_path / "work"))


def bench_of(work: Qncd, model: str, where: str, **changes) -> None:
    """A table as `qncd bench` writes it, of what the run's set was drawn with."""
    manifest = json.loads((work.folder / RUN / "samples/quantized/manifest.json").read_text())
    row = f"{manifest['backend']}-w4a8" + "-compiled" * bool(manifest.get("compiled"))
    rows = [
        {"name": "float32-eager", "seconds_per_call": 0.5, "speedup": 1.0},
        {"name": row, "seconds_per_call": 0.125, "speedup": 4.0},
    ]
    path = work.folder / where / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"model": model, "machine": machine.described(), "rows": rows, **changes})
    )


def test_times_of_this_machine_and_model_are_in_the_table_and_in_the_report(work, tiny_model):
    bench_of(work, str(tiny_model), "runs/bench_other", machine={"cpu": "another"})
    bench_of(work, "zoo:fashion-ldm", "runs/bench_fashion")
    shown = work("eval").stdout
    assert "speedup" not in shown
    assert "speedup" not in (work.folder / RUN / "report.html").read_text()
    bench_of(work, str(tiny_model), "runs/bench_tiny")
    shown = work("eval").stdout
    assert "unchanged" not in shown, "the report has something new to show"
    assert re.search(r"speedup ↑ +│ +1\.000 +│ +4\.000", shown)
    assert re.search(r"time a call, s ↓ +│ +0\.5 +│ +0\.125", shown)
    report = (work.folder / RUN / "report.html").read_text()
    assert "<td>1.000</td><td>4.000</td>" in report.split("speedup")[1]
    assert "eval: unchanged" in work("eval").stdout


def test_the_commands_of_a_report_make_its_set_again(work):
    drawn = ("--num", "3", "--seed", "2", "--steps", "3", "--inter", "none", "--batch-size", "2")
    work("sample", *drawn, "--name", "other")
    work("eval", "--name", "other")
    report = (work.folder / RUN / "report_other.html").read_text()
    lines = html.unescape(report.split("<pre>")[1].split("</pre>")[0]).splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["calibrate", "quantize", "sample"]
    place = work.folder / RUN / "samples/other"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    shutil.rmtree(place)
    work(*shlex.split(lines[2])[1:])
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
