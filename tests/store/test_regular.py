"""What is read as a file is one."""

from __future__ import annotations

import os

import pytest

from qncd_cli.store.regular import open_regular, read_regular


def test_a_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"abc"
    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "file", 3) == b"abc"


@pytest.mark.timeout(5)
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="not a regular file|directory"):
            read_regular(path)


def test_a_file_that_is_too_large_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with pytest.raises(OSError, match="over 2 bytes"):
        read_regular(tmp_path / "file", 2)
