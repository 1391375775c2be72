"""Code in a run directory is used where this user has sealed it, and nowhere else."""

from __future__ import annotations

import os
import stat

import pytest

from qncd_cli.errors import ArtifactError
from qncd_cli.store import own_code
from qncd_cli.store.unfinished import WRITING

CODE = bytes(range(256)) * 9000  # more than is read at once


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def content_of(path):
    """None where it is not opened."""
    with own_code.opened(path) as copy:
        return None if copy is None else copy.read_bytes()


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "run" / "a.graph"
    own_code.seal(path, CODE)
    return path


def test_what_was_sealed_is_opened_and_nothing_else_lies_there(sealed):
    assert own_code.is_sealed(sealed)
    assert content_of(sealed) == CODE
    assert list(sealed.parent.iterdir()) == [sealed]


def test_a_copy_is_private_and_stays_what_it_was_when_the_file_is_written_over(sealed):
    with own_code.opened(sealed) as copy:
        assert copy is not None
        with sealed.open("r+b") as file:
            file.write(b"other")
        (beside,) = (sealed.parent / WRITING).iterdir()
        assert stat.S_IMODE(beside.stat().st_mode) == 0o700
        beside.rename(sealed.parent / "elsewhere")  # by somebody who may write there
        beside.mkdir()
        assert copy.read_bytes() == CODE


def test_no_two_copies_share_a_name(sealed):
    """A loader that is asked for a name that it knows gives what it has loaded under it."""
    names = []
    for _ in range(5):
        with own_code.opened(sealed) as copy:
            names.append(copy)
    assert len(set(names)) == 5


def test_code_is_opened_where_nothing_can_be_written(sealed, monkeypatch):
    (sealed.parent / WRITING).touch()  # no folder of ours can be made there
    assert content_of(sealed) == CODE


@pytest.mark.parametrize("place", [0, 20, 40, 60, 2_000_000])
def test_one_flipped_bit_breaks_the_seal(sealed, place):
    data = bytearray(sealed.read_bytes())
    data[place] ^= 1
    sealed.write_bytes(data)
    assert not own_code.is_sealed(sealed) and content_of(sealed) is None


@pytest.mark.parametrize("end", [0, 5, 30, 51, 1000])
def test_what_is_cut_short_bears_no_seal(sealed, end):
    sealed.write_bytes(sealed.read_bytes()[:end])
    assert content_of(sealed) is None


def test_code_under_another_name_bears_no_seal(sealed):
    assert content_of(sealed.rename(sealed.with_name("b.graph"))) is None


def test_code_that_another_user_sealed_is_not_ours(sealed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "stranger"))
    assert content_of(sealed) is None
    monkeypatch.undo()


def test_a_pipe_in_the_place_of_code_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.graph")
    assert content_of(tmp_path / "a.graph") is None


def test_the_key_is_the_users_alone_and_stays(sealed, home):
    key = own_code.key_file()
    assert key.is_relative_to(home) and key.stat().st_size == own_code.KEY_BYTES
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    before = key.read_bytes()
    own_code.seal(sealed.with_name("b.graph"), CODE)
    assert key.read_bytes() == before and list(key.parent.iterdir()) == [key]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_key_that_others_can_read_is_refused(sealed, what):
    key = own_code.key_file()
    (key if what == "file" else key.parent).chmod(0o755)
    with pytest.raises(ArtifactError, match="others may read"):
        content_of(sealed)


def test_a_damaged_key_is_made_anew_and_what_it_sealed_with_it(sealed):
    own_code.key_file().write_bytes(b"short")
    assert content_of(sealed) is None
    own_code.seal(sealed, CODE)
    assert content_of(sealed) == CODE


def test_without_a_key_nothing_is_written_nor_opened(sealed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))  # no folder can be made there
    assert content_of(sealed) is None
    with own_code.seal_and_open(tmp_path / "b.graph", CODE) as copy:
        assert copy.read_bytes() == CODE
    assert not (tmp_path / "b.graph").exists()


@pytest.fixture
def sealed_folder(tmp_path):
    folder = tmp_path / "graph"
    (folder / "inner").mkdir(parents=True)
    (folder / "net.xml").write_text("<net>")
    (folder / "inner" / "net.bin").write_bytes(CODE)
    own_code.seal_folder(folder)
    return folder


def test_a_folder_is_sealed_with_every_file_in_it(sealed_folder):
    assert own_code.is_sealed_folder(sealed_folder)
    (sealed_folder / "inner" / "net.bin").write_bytes(CODE[1:])
    assert not own_code.is_sealed_folder(sealed_folder)


@pytest.mark.parametrize("change", ["added", "lost", "renamed", "seal lost", "pipe"])
def test_a_folder_with_other_files_bears_no_seal(sealed_folder, change):
    net = sealed_folder / "net.xml"
    if change == "added":
        (sealed_folder / "more").touch()
    elif change == "lost":
        net.unlink()
    elif change == "renamed":
        net.rename(sealed_folder / "inner" / "net.xml")
    elif change == "seal lost":
        (sealed_folder / own_code.SEAL).unlink()
    else:
        os.mkfifo(sealed_folder / "pipe")
    assert not own_code.is_sealed_folder(sealed_folder)
