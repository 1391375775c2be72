import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "qncd_cli"
DOCUMENTS = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
]


PAGES = ["readme_help", "numbers_page", "config_reference", "architecture", "results_page"]


@pytest.mark.parametrize("script", PAGES)
def test_pages_written_from_the_code_are_up_to_date(script):
    check = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_only_files_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), target
    for path in re.findall(
        r"`((?:src|scripts|training|configs|docs|tests|examples)/[\w./-]+)`", text
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("folder", ["src", "scripts", "tests", "configs", "examples", "training"])
def test_sources_cite_only_documents_that_exist(folder):
    cited = {
        (path.name, name)
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".yaml", ".h", ".cpp")
        for name in re.findall(r"\bdocs/[\w./-]*\w", path.read_text(encoding="utf-8"))
    }
    assert [(path, name) for path, name in cited if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_only_code_that_exists(name):
    """`room/module.py` stands for a file of the package, names after a colon for what is in it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    rooms = "|".join(p.name for p in SOURCE.iterdir() if p.is_dir())
    for path in re.findall(rf"`((?:{rooms})/[\w/]+\.(?:py|h|cpp))`", text):
        assert (SOURCE / path).is_file(), path
    for path, listed in re.findall(r"`([\w/]+\.py)`:((?:\s*,?\s*`[\w.]+`)+)", text):
        base = SOURCE if (SOURCE / path).is_file() else ROOT
        assert set(re.findall(r"`([\w.]+)`", listed)) <= defined(base / path), path


NOTES = sorted((ROOT / "docs" / "notebook").glob("2*.md"))


def test_make_docs_writes_every_page_that_is_checked():
    named = set(re.findall(r"scripts/(\w+)\.py", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert named == set(PAGES)


@pytest.mark.parametrize("note", NOTES, ids=lambda p: p.stem)
def test_a_note_says_where_when_and_how_and_what_follows(note):
    text = note.read_text(encoding="utf-8")
    for part in ("- Machine: ", "- Date: ", "- Commit: ", "## Command\n", "## Result\n"):
        assert f"\n{part}" in text, part
    assert text.index("## Command\n") < text.index("## Result\n") < text.index("## Conclusion\n")
    assert f"]({note.name})" in (note.parent / "README.md").read_text(encoding="utf-8")


def test_the_rows_that_results_are_drawn_from_stand_in_their_notes():
    groups = json.loads((ROOT / "docs" / "notebook" / "measured.json").read_text(encoding="utf-8"))
    for group in groups:
        text = (ROOT / "docs" / "notebook" / group["note"]).read_text(encoding="utf-8")
        known = {float(n.replace(",", "")) for n in re.findall(r"-?\b\d[\d,]*(?:\.\d+)?", text)}
        for row in group["rows"]:
            numbers = [v for v in row.values() if isinstance(v, int | float)]
            assert set(numbers) <= known, row


SCHEMA = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_name_the_schema_and_set_keys_that_it_knows(path):
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named and (path.parent / named[1]).resolve() == ROOT / "docs" / "config.schema.json"
    tree = yaml.safe_load(text)
    assert [key for key in keys_of(tree) if property_of(*key) is None] == []


def test_the_schema_finds_what_is_misspelt_and_completes_words():
    assert property_of("sampling", "step") is property_of("sampling", "steps", "more") is None
    pattern = ("quantization", "overrides", "mid_block.*", "weights")
    assert property_of(*pattern, "bits") and property_of(*pattern, "bit") is None
    assert "best" in property_of("quantization", "preset")["anyOf"][0]["enum"]
    assert "brecq" in property_of("quantization", "weights", "rounding")["enum"]
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)


def test_the_schema_takes_what_the_loader_puts_right():
    for key, kind in (("prompts", "string"), ("steps", "null"), ("scheduler", "null")):
        taken = property_of("sampling", key)["anyOf"]
        assert kind in [alternative.get("type") for alternative in taken]


def property_of(*key: str) -> dict | None:
    """What the schema says of a key, its sections first; None where it does not know it."""
    at = SCHEMA
    for part in key:
        at = at.get("properties", {}).get(part) or at.get("additionalProperties")
        if not at:
            return None
        at = SCHEMA["$defs"][at["$ref"].rpartition("/")[2]] if "$ref" in at else at
    return at


def keys_of(tree: dict, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Keys of a configuration that hold values, their sections first."""
    found = []
    for key, value in tree.items():
        path = (*above, key)
        found += keys_of(value, path) if isinstance(value, dict) else [path]
    return found


def test_the_architecture_page_says_of_every_room_what_it_holds():
    rooms = [room for room, _ in runpy.run_path(str(ROOT / "tests" / "test_layers.py"))["ROOMS"]]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| ground |")[0]
    assert re.findall(r"^\| `(\w+)/` \|", table, flags=re.MULTILINE) == rooms


def defined(path: Path) -> set[str]:
    """Functions, classes and constants of a module; what is in a class as Class.name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= _names(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in _names(inner)}
    return found


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}
