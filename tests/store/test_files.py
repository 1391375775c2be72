"""Files: written whole or not at all, nothing left beside them, JSON in one spelling."""

from __future__ import annotations

import os

import pytest

from qncd_cli.errors import ArtifactError
from qncd_cli.store import artifacts, files
from qncd_cli.store.artifacts import Artifact
from qncd_cli.store.files import read_json, write_sealed_json

# ---- atomic writing -----------------------------------------------------------------------------


def test_a_file_is_synced_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), rename(a, b)))
    files.write_bytes(tmp_path / "a", b"data")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its place, the folder


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot be written"):
        files.write_bytes(tmp_path / "file" / "a", b"data")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_files_have_the_mode_that_the_users_mask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        files.write_bytes(tmp_path / "a", b"data")
        tensors = Artifact("partial", {}, {"made_from": {}, "pieces": {}}, "", "")
        artifacts.write(tmp_path / "b", tensors)
    finally:
        os.umask(before)
    assert [(tmp_path / n).stat().st_mode & 0o777 for n in "ab"] == [mode, mode]


# ---- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["leads to a file", "leads to nothing yet"])
def test_a_file_is_written_through_a_link(tmp_path, there):
    target, link = tmp_path / "elsewhere" / "a", tmp_path / "b"
    if there:
        target.parent.mkdir()
        target.write_bytes(b"old")
    link.symlink_to("elsewhere/a")
    files.write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert [p.name for p in target.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("there", [True, False], ids=["leads to a folder", "leads to nothing yet"])
def test_a_folder_is_replaced_behind_a_link(tmp_path, there):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "out"
    if there:
        target.mkdir(parents=True)
        (target / "old").write_text("old")
    link.symlink_to(target)
    with files.replacing_folder(link) as made:
        (made / "new").write_text("new")
    assert link.is_symlink()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_a_file_is_written_into_a_folder_that_a_link_leads_to(tmp_path):
    (tmp_path / "samples").symlink_to("big_disk/samples")  # which is not there yet
    files.write_bytes(tmp_path / "samples" / "set" / "a", b"data")
    assert (tmp_path / "big_disk" / "samples" / "set" / "a").read_bytes() == b"data"


def test_a_link_that_leads_to_itself_is_one_line_and_stays(tmp_path):
    link = tmp_path / "a"
    link.symlink_to("a")
    with pytest.raises(ArtifactError, match="leads back to itself"):
        files.write_bytes(link, b"data")
    with pytest.raises(ArtifactError, match="leads back to itself"), files.replacing_folder(link):
        pass
    assert link.is_symlink()


# ---- JSON ---------------------------------------------------------------------------------------


def test_json_reads_back_and_has_one_spelling(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    files.write_json(tmp_path / "b.json", {"a": [1.5, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert files.read_json(tmp_path / "a.json", "qncd eval") == {"b": 1, "a": [1.5, None]}


def test_json_that_is_missing_or_damaged_is_named_with_the_command(tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(ArtifactError, match=r'metrics\.json: missing \(make it with "qncd eval"'):
        files.read_json(path, "qncd eval")
    for data in (b"", b"{", b"\xff\xfe"):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r'damaged: .*repeat "qncd eval"'):
            files.read_json(path, "qncd eval")


def test_a_sealed_file_is_read_back_and_a_changed_byte_is_found(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1.5, None, {"10": 1, "9": 2}], "macs": 123}
    write_sealed_json(path, {**value, "b": (1.5, None, {10: 1, 9: 2})})
    assert read_json(path, "qncd quantize") == value
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found = read_json(path, "qncd quantize")
        except ArtifactError:
            continue  # found
        assert {**found, "content": 0}.keys() > value.keys()
        assert all(found[key] == value[key] for key in value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"a": NaN}', '{"a": -Infinity}', "\ud800", ""]
)
def test_json_of_another_kind_is_damaged(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ArtifactError, match="damaged") as refused:
        read_json(path, "qncd quantize")
    assert "\n" not in str(refused.value)


@pytest.mark.timeout(5)
def test_a_pipe_in_the_place_of_json_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_json(tmp_path / "a.json", "qncd quantize")
