"""Which files of a folder are read as images, in which order, and as which pixels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qncd_cli.errors import ArtifactError
from qncd_cli.metrics import image
from qncd_cli.metrics.image_files import IMAGE_SUFFIXES, digest_of_files, image_paths

LOSSY = (".jpg", ".jpeg")


def picture(value: int, size: int = 8) -> Image.Image:
    """Grey in every channel, so that no format loses a colour."""
    pixels = np.clip(np.arange(size * size).reshape(size, size) + value, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def pixels_of(path: Path) -> torch.Tensor:
    with Image.open(path) as opened:
        return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)


def relative(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in image_paths(folder)]


# ---- which --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_kind_is_read_with_its_pixels(tmp_path, suffix):
    for i, name in enumerate((f"0{suffix}", f"1{suffix.upper()}")):
        options = {"lossless": True} if suffix == ".webp" else {}
        picture(i).convert("L" if suffix == ".pgm" else "RGB").save(tmp_path / name, **options)
    images = image.load_images(tmp_path).read()
    assert images.shape == (2, 3, 8, 8)
    expected = torch.from_numpy(np.array(picture(0))).expand(3, -1, -1)
    difference = (images[0].int() - expected.int()).abs().max()
    assert difference <= (3 if suffix in LOSSY else 0)


def test_one_set_in_many_kinds_and_folders_is_the_same_set(tmp_path):
    """As 64 files of which 16 were read: another distance, and not a word."""
    (tmp_path / "mixed/a/b").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    kinds = (".png", ".tiff", ".pgm", ".gif", ".bmp", ".ppm", ".tif", ".webp")
    for i in range(16):
        picture(10 * i).save(tmp_path / "plain" / f"{i:02d}.png")
        place = tmp_path / "mixed" / ("a/b", "a", ".")[i % 3]
        options = {"lossless": True} if kinds[i % 8] == ".webp" else {}
        picture(10 * i).save(place / f"{i:02d}{kinds[i % 8]}", **options)
    plain, mixed = (image.load_images(tmp_path / name).read() for name in ("plain", "mixed"))
    network = image.packaged()
    distance = image.feature_distance(plain, mixed, network, rounds=0)["value"]
    assert len(mixed) == len(plain) == 16
    assert distance == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["a.heic", "b.avif"], "4 files, 2 read; not 1 .heic, 1 .avif"),
        (["sub/a.jxl"], "3 files, 2 read; not 1 .jxl (first: sub/a.jxl)"),
        (["numbers.npy", "more.npy"], "4 files, 2 read; not 2 .npy"),
        (["a"], "3 files, 2 read; not 1 without a suffix"),
    ],
)
def test_files_that_are_not_read_are_counted_and_refused(tmp_path, others, said):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match="files, ") as caught:
        image.load_images(tmp_path).read()
    assert said in str(caught.value)
    with pytest.raises(ArtifactError):
        image.load_reference(tmp_path)


def test_texts_hidden_files_and_what_a_set_keeps_are_left_aside(tmp_path):
    picture(0).save(tmp_path / "0.png")
    for name in ("manifest.json", "labels.csv", "LICENSE", "latents.safetensors", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".parts").mkdir()
    picture(0).save(tmp_path / ".parts/1.png")
    assert relative(tmp_path) == ["0.png"]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "far").mkdir()
    picture(0).save(tmp_path / "far/1.png")
    (tmp_path / "set/linked").symlink_to(tmp_path / "far")
    assert relative(tmp_path / "set") == ["linked/1.png"]
    (tmp_path / "far/back").symlink_to(tmp_path / "set")
    with pytest.raises(ArtifactError, match="twice"):
        image_paths(tmp_path / "set")


# ---- in which order -----------------------------------------------------------------------------


def test_numbers_in_names_are_numbers(tmp_path):
    names = ["999999.png", "1000000.png", "2.png", "a10.png", "a9.png", "b/10.png", "b/9.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / name)
    order = ["2.png", "999999.png", "1000000.png", "a9.png", "a10.png", "b/9.png", "b/10.png"]
    assert sorted(relative(tmp_path)) == sorted(order)
    found = relative(tmp_path)
    for first, then in (order[:2], order[1:3], order[3:5], order[5:]):
        assert found.index(first) < found.index(then)


def test_the_digest_is_of_contents_and_their_order(tmp_path):
    for name, value in (("a", 0), ("b", 1), ("c", 0)):
        picture(value).save(tmp_path / f"{name}.png")
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    assert digest_of_files([a, b]) == digest_of_files([c, b])
    assert digest_of_files([a, b]) != digest_of_files([b, a])
    assert digest_of_files([a, b]) != digest_of_files([a])


# ---- as which pixels ----------------------------------------------------------------------------


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (200, 100, 0, 255)
    rgba[:, 4:6] = (200, 100, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "0.png")
    Image.fromarray(rgba).save(tmp_path / "1.webp", lossless=True, exact=True)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "2.gif", transparency=1)
    clear = [Image.new("L", (8, 8), value) for value in (7, 0)]
    Image.merge("LA", clear).save(tmp_path / "3.png")
    images = image.load_images(tmp_path).read()
    assert images[0, :, 0, 0].tolist() == [200, 100, 0]
    assert images[0, :, 0, 4].tolist() == [227, 177, 127]
    assert images[0, :, 0, 7].tolist() == [255, 255, 255]
    assert torch.equal(images[1], images[0])
    assert (images[2:] == 255).all()


def test_orientation_is_as_exif_says(tmp_path):
    upright = picture(0)
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = upright.transpose(turn)
        turned.save(tmp_path / f"{orientation}.png", exif=exif)
        turned.convert("RGB").save(tmp_path / f"{orientation}.tif", exif=exif)
    expected = torch.from_numpy(np.array(upright)).expand(3, -1, -1)
    images = image.load_images(tmp_path).read()
    assert len(images) == 4
    assert all(torch.equal(found, expected) for found in images)


def deep_png(path: Path) -> None:
    """16 bits a channel in colour, which Pillow reads as 8 without a word."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b"".join(b"\0" + struct.pack(">24H", *[40_000] * 24) for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    body = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def deep_ppm(path: Path) -> None:
    path.write_bytes(b"P6 8 8 65535\n" + b"\x80\x00" * 192)


def deep_tiff(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path)


@pytest.mark.parametrize(
    ("write", "name"), [(deep_png, "0.png"), (deep_ppm, "0.ppm"), (deep_tiff, "0.tiff")]
)
def test_more_than_8_bits_are_not_cut(tmp_path, write, name):
    write(tmp_path / name)
    with pytest.raises(ArtifactError, match="more than 8 bits"):
        image.load_images(tmp_path).read()


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_several_images_in_one_file_are_refused(tmp_path, suffix):
    first, second = picture(0).convert("RGB"), picture(90).convert("RGB")
    first.save(tmp_path / f"0{suffix}", save_all=True, append_images=[second])
    with pytest.raises(ArtifactError, match="2 frames in one file"):
        image.load_images(tmp_path).read()


def test_a_photograph_with_a_preview_is_one_image(tmp_path):
    picture(0).convert("RGB").save(
        tmp_path / "0.jpg", "MPO", save_all=True, append_images=[picture(0, 4).convert("RGB")]
    )
    assert torch.equal(image.load_images(tmp_path).read()[0], pixels_of(tmp_path / "0.jpg"))
