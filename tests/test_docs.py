import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "qncd_cli"
DOCUMENTS = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize(
    "script", ["readme_help.py", "numbers_page.py", "config_reference.py", "architecture.py"]
)
def test_pages_written_from_the_code_are_up_to_date(script):
    check = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"],
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
    for path in re.findall(r"`((?:src|scripts|configs|docs|tests|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


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
