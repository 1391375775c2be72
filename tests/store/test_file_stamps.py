"""Digests of large files are computed once for the same stamps, and again for any other."""

from __future__ import annotations

import os

import pytest

from qncd_cli.store import file_stamps
from qncd_cli.store.file_stamps import remembered


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large and was written a while ago; the cache is a folder of its own."""
    monkeypatch.setattr(file_stamps, "LARGE", 4)
    monkeypatch.setenv("QNCD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"12345")
    os.utime(path, (1e9, 1e9))
    return path


def computed(files, what="model", digest="0123456789abcdef"):
    """The digest, and how often it was computed."""
    calls = []

    def compute():
        calls.append(1)
        return digest

    assert remembered(what, files, compute) == digest
    return len(calls)


def test_the_same_stamps_are_read_once(large):
    assert computed([large]) == 1
    assert computed([large]) == 0
    assert computed([large], what="checkpoint") == 1


@pytest.mark.parametrize("change", ["size", "time", "another file in its place", "one more file"])
def test_other_stamps_are_read_again(large, change):
    computed([large])
    files = [large]
    if change == "size":
        large.write_bytes(b"123456")
        os.utime(large, (1e9, 1e9))
    elif change == "time":
        os.utime(large, ns=(10**18, 10**18 + 1))
    elif change == "another file in its place":
        other = large.with_name("other")
        other.write_bytes(b"54321")
        os.utime(other, (1e9, 1e9))
        other.replace(large)
    else:
        files.append(large.with_name("more"))
        files[1].write_bytes(b"")
    assert computed(files) == 1


def test_a_link_to_another_file_of_the_same_size_is_read_again(large):
    other, link = large.with_name("other"), large.with_name("link")
    other.write_bytes(b"54321")
    os.utime(other, (1e9, 1e9))
    for target in (large, other):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert computed([link]) == 1


def test_a_file_that_has_just_changed_is_not_remembered(large):
    os.utime(large)
    assert computed([large]) == 1
    assert computed([large]) == 1


def test_small_files_are_always_read(large, monkeypatch):
    monkeypatch.setattr(file_stamps, "LARGE", 6)
    assert computed([large]) == computed([large]) == 1


@pytest.mark.parametrize("place", ["a file", "damaged"])
def test_a_cache_that_is_no_use_is_ignored(large, tmp_path, place):
    if place == "a file":
        (tmp_path / "cache").write_text("in the way")
    else:
        computed([large])
        (kept,) = (tmp_path / "cache/digests").iterdir()
        kept.write_bytes(b"\xff half")
    assert computed([large]) == 1


def test_a_file_that_is_missing_is_left_to_the_computation(large):
    gone = large.with_name("gone")
    with pytest.raises(FileNotFoundError):
        remembered("model", [gone], gone.read_text)
