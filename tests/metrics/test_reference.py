"""Images and references from strangers: nothing hangs, nothing grows, broken files are named."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qncd_cli.errors import ArtifactError
from qncd_cli.metrics.images_on_disk import read_images
from qncd_cli.metrics.reference import load_images, load_reference

HINT = "not a readable image"


def save(path: Path, value: int, size: int = 4) -> Path:
    Image.new("RGB", (size, size), (value, 2 * value, 3)).save(path)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def folder(tmp_path):
    """Four images, two of them broken."""
    for i in range(4):
        save(tmp_path / f"{i}.png", 10 * i)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    (tmp_path / "2.png").write_bytes(b"no image")
    return tmp_path


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_an_image_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ArtifactError, match=r"a.png: .*not a regular file"):
        load_images(tmp_path)


@pytest.mark.parametrize("sides", [(50_000, 50_000), (10_000, 10_000), (2**31 - 1, 1)])
def test_an_image_of_gigabytes_is_refused_before_it_is_decoded(tmp_path, sides):
    (tmp_path / "a.png").write_bytes(png(*sides, b"\0" * 1000))
    with pytest.raises(ArtifactError, match=r"a.png: .*(pixels|exceeds)"):
        load_images(tmp_path)


def test_broken_images_are_all_named(folder):
    with pytest.raises(ArtifactError, match=r"2 of 4 images cannot be read: 1.png, 2.png"):
        load_images(folder)


def test_broken_images_are_left_out_where_that_is_wanted(folder):
    skipped: list[Path] = []
    images = load_images(folder, skipped)
    assert [path.name for path in skipped] == ["1.png", "2.png"]
    assert images.shape == (2, 3, 4, 4) and images.read()[:, 0, 0, 0].tolist() == [0, 30]
    reference = load_reference(folder, skip_broken=True)
    assert reference.skipped == ("1.png", "2.png") and reference.num_samples == 2
    for name in reference.skipped:
        (folder / name).unlink()
    assert load_reference(folder).digest == reference.digest


def test_a_folder_of_nothing_but_broken_images_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ArtifactError, match=HINT):
        load_images(tmp_path, [])


@pytest.mark.parametrize("wrong", ["bits", "cut", "empty"])
def test_whatever_is_in_an_image_file_is_read_or_refused(tmp_path, wrong):
    good = save(tmp_path / "a.png", 7, 32).read_bytes()
    for place in range(8, len(good), 5):
        data = bytearray(good)
        data[place] ^= 0x41
        data = {"bits": data, "cut": good[:place], "empty": b""}[wrong]
        (tmp_path / "a.png").write_bytes(data)
        with suppress(ArtifactError):
            read_images([tmp_path / "a.png"])


def npz_that_claims(path: Path, shape: tuple[int, ...], data: bytes = b"") -> Path:
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    header += b" " * (118 - len(header)) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", npy)
    return path


def test_an_npz_that_claims_more_than_it_holds_is_refused(tmp_path):
    path = npz_that_claims(tmp_path / "a.npz", (300_000, 256, 206, 3), b"\0" * 100)
    with pytest.raises(ArtifactError, match="arr_0 claims 47462400000 bytes, 100 are there"):
        load_reference(path)


def test_an_npz_that_does_not_fit_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qncd_cli.metrics.array_files.available_memory", lambda: 10_000)
    path = npz_that_claims(tmp_path / "a.npz", (10, 64, 64, 3), b"\0" * 122_880)
    with pytest.raises(ArtifactError, match="122880 bytes, 10000 bytes of memory are free"):
        load_reference(path)


def test_python_objects_in_an_npz_are_not_made(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ArtifactError, match="Python objects"):
        load_reference(tmp_path / "a.npz")


def test_numpys_own_files_are_read(tmp_path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "a.npz", arr_0=images)
        assert np.array_equal(load_images(tmp_path / "a.npz").permute(0, 2, 3, 1), images)
