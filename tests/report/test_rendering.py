"""Templates belong to the package, escape what is not theirs, and stumble over what is missing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import jinja2
import pytest

from qncd_cli.report import rendering

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "src" / "qncd_cli" / "report" / "templates"


def test_templates_are_in_the_wheel(tmp_path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        packed = {Path(name).name for name in file.namelist() if "report/templates/" in name}
    assert packed == {path.name for path in TEMPLATES.iterdir()} and len(packed) > 5


def test_values_are_escaped_and_parts_are_not_escaped_twice() -> None:
    part = rendering.part("definitions.html", values=[("<b>", "a & b")])
    assert "&lt;b&gt;" in part and "a &amp; b" in part
    assert part.__html__() == part


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        rendering.render("definitions.html")
