"""A sample set in the layouts that other tools read, written beside it piece by piece.

| format | beside the set NAME | what |
|---|---|---|
| folders | NAME_folders/0012/012345.png | a folder for every thousand seeds |
| webdataset | NAME_webdataset/0012.tar | 012345.png and 012345.cls, its class, for every thousand |
| npz | NAME.npz | arr_0 uint8 [N, H, W, 3] and arr_1, classes, as ADM has them; seeds |

Images in folders are links to the set's own, where the file system can do so.
The same set gives the same bytes. A piece that is there already is not written again.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import numpy as np

from ..errors import ArtifactError
from ..metrics.images_on_disk import CHUNK
from ..progress import Track, no_progress
from ..store.digests import digest_of
from ..store.files import read_json, replacing, write_bytes, write_json
from .sample_set import SampleSet
from .sample_sets import image_path

IN_PIECE = 1000
"""Images in a folder or a tar file; larger: fewer of them, and more is written again when a set
grows."""
INDEX = "index.json"


def format_path(folder: Path, format: str) -> Path:
    """Where a set is in that format."""
    if format == "npz":
        return folder.with_name(f"{folder.name}.npz")
    return folder if format == "png" else folder.with_name(f"{folder.name}_{format}")


def write_format(samples: SampleSet, format: str, track: Track = no_progress) -> Path:
    """Write a whole set in a format and return its place.

    Raises ArtifactError for images that are damaged, and where nothing can be written.
    """
    place = format_path(samples.folder, format)
    if format == "npz":
        _write_npz(samples, place, track)
    elif format != "png":
        _write_pieces(samples, place, {"folders": _folder, "webdataset": _tar}[format], track)
    return place


# ------------------------------------------------------------------ folders and tar files

Seeds = list[int]
Writer = Callable[[SampleSet, Path, Seeds], str]


def _write_pieces(samples: SampleSet, place: Path, write: Writer, track: Track) -> None:
    """A piece for every thousand seeds, and an index that says what is in it."""
    try:
        known = read_json(place / INDEX, "qncd sample")["pieces"]
    except (ArtifactError, KeyError, TypeError):
        known = {}
    found = {}
    groups = [[*seeds] for _, seeds in groupby(samples.seeds, lambda seed: seed // IN_PIECE)]
    what = f"writing {place.name}"
    for seeds in track(groups, what, len(groups), "pieces"):
        name = f"{seeds[0] // IN_PIECE:04d}"
        content = digest_of([_content(samples, seeds), seeds])
        there = known.get(name, {})
        if there.get("content") != content or not (place / str(there.get("path"))).exists():
            path = write(samples, place / name, seeds)
            there = {"path": path, "content": content, "images": len(seeds)}
        found[name] = there
    write_json(place / INDEX, {"images": len(samples.seeds), "pieces": found})


def _content(samples: SampleSet, seeds: Iterable[int]) -> list[str]:
    """What the images of these seeds look like, or where that is not known how they were made."""
    pixels = samples.latents.pixels()
    if pixels is None:
        return [samples.manifest["digest"], samples.latents.stored.digest]
    return [samples.manifest["digest"], *(pixels[seed] for seed in seeds)]


def _folder(samples: SampleSet, place: Path, seeds: Seeds) -> str:
    place.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        source = image_path(samples.folder, seed)
        link_or_copy(source, place / source.name)
    return place.name


def link_or_copy(source: Path, place: Path) -> None:
    """The same file at another place, without copying it where the file system can do so."""
    try:
        if place.exists():
            if place.samefile(source):
                return
            place.unlink()
        os.link(source, place)
    except OSError:
        write_bytes(place, source.read_bytes())


def _tar(samples: SampleSet, place: Path, seeds: Seeds) -> str:
    class_of = dict(zip(samples.seeds, samples.manifest["classes"], strict=True))
    path = place.with_suffix(".tar")
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as t:
        for seed in seeds:
            source = image_path(samples.folder, seed)
            _add(t, source.name, source.read_bytes())
            _add(t, source.with_suffix(".cls").name, str(class_of[seed]).encode())
    return path.name


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


# ------------------------------------------------------------------ npz


def _write_npz(samples: SampleSet, path: Path, track: Track) -> None:
    content = digest_of([_content(samples, samples.seeds), samples.seeds]).encode()
    if _comment(path) == content:
        return
    count, channels, height, width = samples.images.shape
    chunks = -(-count // CHUNK)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            images = samples.images.split(CHUNK)
            for chunk in track(images, f"writing {path.name}", chunks, "chunks"):
                file.write(chunk.permute(0, 2, 3, 1).contiguous().numpy().data)
        for name, values in (("arr_1", samples.manifest["classes"]), ("seeds", samples.seeds)):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, np.array(values, np.int64))
        archive.comment = content


def _comment(path: Path) -> bytes:
    """What the file says that it was made from."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except (OSError, zipfile.BadZipFile):
        return b""
