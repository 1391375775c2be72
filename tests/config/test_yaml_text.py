"""YAML from a stranger is read within bounds, at once."""

from __future__ import annotations

import os
import time

import pytest
import yaml
from conftest import MODEL, refused

from qncd_cli.config.loading import load_config
from qncd_cli.config.yaml_text import MOST, parse_yaml
from qncd_cli.errors import ConfigError

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
"""Nine lines that stand for 9^9 values."""


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, f"more than {MOST} values"),
        ("a: " + "[" * 5000 + "]" * 5000, "levels within each other|nesting"),
        ("a: " + "{a: " * 5000 + "}" * 5000, "levels within each other|nesting|simple key"),
        ("a: &a [*a]", "stands within itself"),
        ("a: &a {b: [*a]}", "stands within itself"),
        ("a: " + "9" * 5000, "."),
        ("? [a, b]\n: c", "unhashable|."),
        ("a: 2001-99-99", "month"),
        ("a: !!python/object/apply:os.system [true]", "could not determine"),
        ("a: *nobody", "undefined alias"),
        ("a: 1\na: 2", "again"),
        ("a: \x00", "."),
    ],
)
def test_what_is_beyond_the_bounds_is_refused_at_once(text, said):
    before = time.perf_counter()
    with pytest.raises(yaml.YAMLError, match=said):
        parse_yaml(text)
    assert time.perf_counter() - before < 5


def test_what_is_within_the_bounds_is_what_yaml_says(minimal):
    text = "a: &a [1, {b: c}]\nd: *a\ne: {<<: {x: 1}, y: 2}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("- " * 60 + "a") is not None
    assert len(parse_yaml("x: [" + "prompt, " * 200_000 + "]")["x"]) == 200_000


@pytest.mark.parametrize("text", [LAUGHS, "[" * 5000, "9" * 5000, "0x" + "f" * 9999])
def test_a_configuration_and_an_override_say_so_in_one_line(tmp_path, minimal, text):
    path = tmp_path / "own.yaml"
    path.write_text(f"{yaml.safe_dump(MODEL)}sampling: {{steps: {text}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert len(refused(minimal, f"sampling.steps={text}")) < 1000


@pytest.mark.timeout(10)
def test_a_pipe_in_the_place_of_a_configuration_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "own.yaml")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "own.yaml")


def test_a_long_value_and_many_mistakes_are_cut(minimal):
    said = refused(minimal, f"sampling.steps=[{'1, ' * 10_000}]")
    assert len(said) < 1000
    said = refused(minimal, f"sampling={{{', '.join(f'key{i}: 1' for i in range(500))}}}")
    assert "480 more" in said
