"""Microsoft's Fluent emoji in 3D as labelled 64x64 images, for the packaged emoji-ldm.

The npm package @lobehub/fluent-emoji-3d (MIT) holds 3,391 renders of 256x256 pixels, named by
their code points. It is fetched once with the ordinary client, `npm pack`, into a cache folder.
Classes are lists of code points: what a person would name at a glance.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
CACHE = Path.home() / ".cache" / "qncd-emoji"
IMAGE_SIZE = 64
VARIANT_SELECTOR = 0xFE0F
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL = range(0x1F1E6, 0x1F200)  # two of them are a flag

# Class -> code points, "first-last" or single, hexadecimal; skin tones of each belong to it
CLASSES = {
    "face": "1f600-1f606 1f609-1f60d 1f60f-1f637 1f641-1f642 1f644 1f910 1f912 1f914-1f915 1f917 "
    "1f924-1f925 1f928-1f92b 1f92d 1f970 1f972 1f974-1f976 1f979-1f97a 1f9d0 1fae0 1fae2-1fae4 "
    "2639 263a",
    "animal": "1f428 1f42d-1f42f 1f430-1f431 1f434-1f43c 1f638-1f640 1f648-1f64a 1f981 1f984 1f989 "
    "1f98a 1f99d",
    "person": "1f466-1f469 1f471 1f473-1f478 1f482 1f46e 1f934 1f9d1-1f9d5",
    "hand": "1f446-1f44a 1f44c-1f44e 1f590 1f595-1f596 1f90c 1f90f 1f918-1f91c 1f91e-1f91f 1faf0 "
    "1faf3-1faf5 261d 270a-270c",
    "heart": "1f493-1f497 1f499-1f49e 1f5a4 1f90d-1f90e 1f9e1 1fa75-1fa77 2764 2665",
    "plant": "1f331-1f335 1f337-1f33c 1f340-1f343 1f384 1f490 1f940 1fab4 1fab7 1fabb 2618",
    "fruit": "1f345-1f353 1f951 1f955 1f95d 1f966 1f96d 1f965 1f9c4-1f9c5 1fad0-1fad2",
    "vehicle": "1f3ce 1f682-1f68e 1f690-1f69c 1f6fa-1f6fb",
    "building": "1f3d8 1f3da-1f3db 1f3e0-1f3e6 1f3e8-1f3ed 1f3ef-1f3f0 1f492 1f54c-1f54d 1f5fc "
    "1f6d5 26ea 26e9",
    "clock": "1f550-1f567 1f570 23f0-23f2",
    "sign": "1f170-1f171 1f17e-1f17f 1f18e 1f191-1f19a 1f201-1f202 1f21a 1f22f 1f232-1f23a 1f3e7 "
    "1f500-1f504 1f51f-1f524 1f52f 1f549 1f54e 1f6b9-1f6bc 1f6be 1f6c2-1f6c5 1f6d0 2139 2194-2199 "
    "21a9-21aa 23cf 23e9-23ef 23f8-23fa 25b6 25c0 2648-2653 2638 262a 262e-262f 269b 26ce 27a1 "
    "2b05-2b07 2934-2935",
    "flag": "1f1e6-1f1ff",
}
# Mirrored images of these would be wrong
NOT_MIRRORED = ("clock", "sign", "flag")


def fetch(cache: Path = CACHE) -> Path:
    """The package's tar file, downloaded if it is not there."""
    stem = PACKAGE.replace("@", "", 1).replace("/", "-").replace("@", "-")
    path = cache / f"{stem}.tgz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def parse(spans: str) -> set[int]:
    """Code points of "1f600-1f602 2639"."""
    found: set[int] = set()
    for span in spans.split():
        first, _, last = span.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return found


def class_of(points: list[int]) -> int | None:
    """Index into CLASSES of an emoji; None where no class wants it.

    points: its code points. Only single emoji, with or without a skin tone, and flags of two
    regional letters: sequences that join several people or things belong to no class.
    """
    rest = [p for p in points if p != VARIANT_SELECTOR and p not in SKIN_TONES]
    flag = len(rest) == 2 and all(p in REGIONAL for p in rest)
    if len(rest) != 1 and not flag:
        return None
    for index, spans in enumerate(CLASSES.values()):
        if rest[0] in parse(spans):
            return index
    return None


def read_image(data: bytes) -> Tensor:
    """An encoded image on white -> uint8 [3, 64, 64]."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    flat = flat.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return (
        torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8)
        .view(IMAGE_SIZE, IMAGE_SIZE, 3)
        .permute(2, 0, 1)
    )


def load(path: Path) -> tuple[Tensor, Tensor]:
    """All images [N, 3, 64, 64] uint8 and labels [N] int64, -1 where no class; by name."""
    images, labels = [], []
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if m.name.endswith(".webp")]
        for member in sorted(members, key=lambda m: m.name):
            points = [int(part, 16) for part in Path(member.name).stem.split("-")]
            file = archive.extractfile(member)
            assert file is not None
            images.append(read_image(file.read()))
            found = class_of(points)
            labels.append(-1 if found is None else found)
    return torch.stack(images), torch.tensor(labels)
