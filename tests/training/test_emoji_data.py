import io
import tarfile

import emoji_data
import pytest
import torch
from PIL import Image

NAMES = list(emoji_data.CLASSES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1f600", "face"),
        ("1f63a", "animal"),
        ("1f468-1f3fd", "person"),
        ("1f44d-1f3fb", "hand"),
        ("2764-fe0f", "heart"),
        ("1f1eb-1f1f7", "flag"),
        ("1f468-200d-1f52c", None),
        ("1f1eb", "flag"),
        ("1f9e6", None),
    ],
)
def test_code_points_have_the_class_a_person_would_name(name, expected):
    found = emoji_data.class_of([int(part, 16) for part in name.split("-")])
    assert (None if found is None else NAMES[found]) == expected


def test_no_code_point_belongs_to_two_classes():
    spans = [emoji_data.parse(text) for text in emoji_data.CLASSES.values()]
    assert len(set.union(*spans)) == sum(map(len, spans))
    assert set(emoji_data.NOT_MIRRORED) <= set(NAMES)


def test_spans_of_code_points_are_read_with_their_ends():
    assert emoji_data.parse("1f600-1f602 2639") == {0x1F600, 0x1F601, 0x1F602, 0x2639}


def encoded(colour, kind="webp", size=(256, 256)):
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def test_what_is_transparent_becomes_white():
    image = emoji_data.read_image(encoded((255, 0, 0, 0)))
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.uint8
    assert (image == 255).all()


def test_a_package_is_read_in_the_order_of_its_names(tmp_path):
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, colour in (("2764-fe0f", "red"), ("1f600", "yellow"), ("1f9e6", "blue")):
            data = encoded(colour)
            entry = tarfile.TarInfo(f"package/assets/{name}.webp")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("package/README.md"))
    images, labels = emoji_data.load(path)
    assert labels.tolist() == [NAMES.index("face"), -1, NAMES.index("heart")]
    assert images[:, :, 0, 0].tolist() == [[255, 255, 0], [0, 0, 255], [255, 0, 0]]


def test_a_package_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    there = tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    there.write_bytes(b"any")
    monkeypatch.setenv("PATH", "")
    assert emoji_data.fetch(tmp_path) == there
