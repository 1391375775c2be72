"""Every test file lies as its module does: tests/ROOM/test_MODULE.py or test_MODULE_ASPECT.py."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NO_MODULE = {
    "end_to_end": "promises of the whole command line, which pass through all rooms",
    "test_batch.py": "docs/batch.md",
    "test_docs.py": "the documents",
    "test_examples.py": "examples/",
    "test_layers.py": "imports between all rooms",
    "test_mirror.py": "the tests themselves",
    "test_prose.py": "docstrings of all modules",
    "test_readme.py": "README.md",
}
"""Folders and files of tests/ that stand beside no module, and what they test instead."""

FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("name", [f for f in FILES if not {f, f.split("/")[0]} & NO_MODULE.keys()])
def test_a_test_file_stands_beside_its_module(name):
    folder = Path(name).parent
    source = ROOT if folder.name in ("scripts", "training") else ROOT / "src" / "qncd_cli"
    words = Path(name).stem.removeprefix("test_").split("_")
    modules = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
    assert any((source / folder / f"{module}.py").is_file() for module in modules), name


def test_the_exceptions_are_there():
    assert [name for name in NO_MODULE if not (TESTS / name).exists()] == []
