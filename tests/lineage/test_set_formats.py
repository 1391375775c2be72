"""A set in other layouts: the images and classes of its manifest, the same bytes every time."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import Qncd
from PIL import Image

from qncd_cli.lineage import set_formats
from qncd_cli.metrics.reference import load_images

SAMPLES = Path("runs/tiny/samples")
SAMPLE = ("sample", "--batch-size", "4", "--no-compile", "--num")


@pytest.fixture
def work(sampled_shallow, tmp_path, monkeypatch) -> Qncd:
    """A copy of a run with six images; four make a piece."""
    monkeypatch.setattr(set_formats, "IN_PIECE", 4)
    return Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.*") if p.name != "index.json"}


def test_an_npz_is_what_adms_evaluator_reads(work):
    path = work.folder / work(*SAMPLE, "6", "--format", "npz", "--json").data["packed"]
    manifest = json.loads((work.folder / SAMPLES / "quantized/manifest.json").read_text())
    with np.load(path) as arrays:
        images, labels, seeds = arrays["arr_0"], arrays["arr_1"], arrays["seeds"]
    assert images.dtype == np.uint8 and images.shape == (6, 16, 16, 3)
    folder = work.folder / SAMPLES / "quantized"
    for image, seed in zip(images, seeds, strict=True):
        assert np.array_equal(image, pixels(folder / f"{seed:06d}.png"))
    assert (labels.tolist(), seeds.tolist()) == (manifest["classes"], manifest["seeds"])
    assert len(load_images(path)) == 6
    before = path.read_bytes(), path.stat().st_mtime_ns
    work(*SAMPLE, "6", "--format", "npz")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    path.unlink()
    work(*SAMPLE, "6", "--format", "npz")
    assert path.read_bytes() == before[0]
    work(*SAMPLE, "7", "--format", "npz")
    with np.load(path) as arrays:
        assert len(arrays["arr_0"]) == 7


def test_tar_files_hold_an_image_and_its_class_under_one_key(work):
    place = work.folder / work(*SAMPLE, "6", "--format", "webdataset", "--json").data["packed"]
    folder = work.folder / SAMPLES / "quantized"
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {}
    for path in sorted(place.glob("*.tar")):
        with tarfile.open(path) as archive:
            found[path.name] = {m.name: archive.extractfile(m).read() for m in archive}
    assert [len(files) for files in found.values()] == [8, 4]
    files = found["0000.tar"] | found["0001.tar"]
    for seed, label in zip(manifest["seeds"], manifest["classes"], strict=True):
        assert files[f"{seed:06d}.png"] == (folder / f"{seed:06d}.png").read_bytes()
        assert files[f"{seed:06d}.cls"] == str(label).encode()
    before = stamps(place)
    work(*SAMPLE, "7", "--format", "webdataset")
    after = stamps(place)
    assert after["0000.tar"] == before["0000.tar"]  # only what grew is written again
    assert after["0001.tar"] != before["0001.tar"]
    assert json.loads((place / "index.json").read_text())["images"] == 7


def test_folders_hold_a_few_images_each_without_a_second_copy(work):
    place = work.folder / work(*SAMPLE, "6", "--format", "folders", "--json").data["packed"]
    names = [str(p.relative_to(place)) for p in sorted(place.rglob("*.png"))]
    assert names == [f"{s // 4:04d}/{s:06d}.png" for s in range(6)]
    assert (place / names[5]).samefile(work.folder / SAMPLES / "quantized/000005.png")
    assert len(load_images(place)) == 6
    measured = work("eval", "--images", str(place), "--network", "fashion", "--json").data
    assert measured["protocol"]["num_samples"] == 6


def test_shards_are_given_a_format_when_they_are_joined(work):
    named = (*SAMPLE, "6", "--name", "new")
    assert work(*named, "--shard", "1/2", "--format", "npz", ok=False).exit_code == 3
    for shard in ("1/2", "2/2"):
        work(*named, "--shard", shard)
    path = work.folder / work("merge", "--name", "new", "--format", "npz", "--json").data["packed"]
    with np.load(path) as arrays:
        assert len(arrays["arr_0"]) == 6
