"""Every writer of the run directory under every fault of the file layer.

Run with faults.c preloaded. Prints how many faults were met, or what was wrong.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from qncd_cli.errors import ArtifactError
from qncd_cli.store import artifacts, own_code
from qncd_cli.store.artifacts import Artifact
from qncd_cli.store.files import replacing_folder, write_bytes, write_json, write_sealed_json

LAYER = ctypes.CDLL(None)
FAULTS = [
    *(("write", code, half) for code in (errno.ENOSPC, errno.EIO) for half in (0, 1)),
    *(("fsync", code, 0) for code in (errno.EIO, errno.ENOSPC)),
    *(("rename", code, 0) for code in (errno.EIO, errno.ENOSPC)),
    *(("open", code, 0) for code in (errno.ENOSPC, errno.EDQUOT)),
    ("mkdir", errno.ENOSPC, 0),
]


def artifact(value: float) -> Artifact:
    """Larger than what a file object keeps back before it writes."""
    body = {"layers": {"a": {"in_channels": 50_000, "shifted": False}}}
    return Artifact("smoothing", {"a.smoothing": torch.full((50_000,), value)}, body, "c", "m")


def write_folder(folder: Path, value: int) -> None:
    with replacing_folder(folder / "made") as made:
        (made / "a").write_text(str(value))
        (made / "b").write_bytes(bytes(50_000))


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "bytes": lambda folder, value: write_bytes(folder / "a", bytes([value]) * 50_000),
    "json": lambda folder, value: write_json(folder / "a.json", [value] * 9000),
    "sealed json": lambda folder, value: write_sealed_json(folder / "a.json", {"a": value}),
    "artifact": lambda folder, value: artifacts.write(
        folder / "a.safetensors", artifact(float(value))
    ),
    "code": lambda folder, value: own_code.seal(folder / "a.graph", bytes([value]) * 50_000),
    "folder": write_folder,
}


def content(folder: Path) -> dict[str, bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def main(root: Path) -> None:
    met = 0
    for name, write in WRITERS.items():
        states = []
        for value in (1, 2):
            write(root / "good", value)
            states.append(content(root / "good"))
            shutil.rmtree(root / "good")
        for call, code, half in FAULTS:
            for number in itertools.count(1):
                folder = root / "run"
                write(folder, 1)
                LAYER.fault_arm(call.encode(), number, code, half, str(root).encode())
                try:
                    write(folder, 2)
                    said = ""
                except ArtifactError as error:
                    said = str(error)
                hit = LAYER.fault_hits()
                LAYER.fault_arm(b"", 0, 0, 0, b"")
                where = f"{name}: {call} {number} fails with {errno.errorcode[code]}"
                assert hit or not said, f"{where}: said {said!r}"
                assert "\n" not in said, where
                wanted = states if said else states[1:]  # old or new; new where nothing was said
                assert content(folder) in wanted, f"{where}: {sorted(content(folder))}"
                write(folder, 2)
                assert content(folder) == states[1], f"{where}: and then"
                shutil.rmtree(folder)
                met += hit
                if not hit:
                    break
    print(met)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
