"""The run directory: the current run is found again, a missing one is named with the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from qncd_cli.errors import ArtifactError
from qncd_cli.store.run_dir import RunDir, find_run, read_coverage, set_current


def make_run(path: Path) -> RunDir:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("model: {source: x}\n")
    return RunDir(path)


def test_the_current_run_is_found_from_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs") / "first")
    set_current(run)
    assert find_run(None) == run
    other = make_run(Path("runs") / "second")
    assert find_run(str(other.path)) == other
    set_current(other)
    assert find_run(None) == other


def test_a_copied_folder_finds_its_own_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_current(make_run(Path("runs") / "first"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_run(None).config.is_file()


def test_no_current_run_says_how_to_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r'no current run in .*start with "qncd calibrate'):
        find_run(None)


def test_a_current_run_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_current(RunDir(Path("runs") / "gone"))
    with pytest.raises(ArtifactError, match=r"runs/gone/config\.yaml: missing"):
        find_run(None)


def test_a_run_that_is_not_there_is_named_with_the_command(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.yaml: missing .*--run-dir"):
        find_run(str(tmp_path / "no"))


@pytest.mark.parametrize("text", ["{}", "[]", '{"layers": [], "macs": 3}'])
def test_coverage_of_an_earlier_version_is_refused_with_the_command_that_mends_it(tmp_path, text):
    path = tmp_path / "coverage.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="earlier version") as refused:
        read_coverage(path)
    assert "qncd quantize --force" in refused.value.hint
