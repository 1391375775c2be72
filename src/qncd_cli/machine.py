"""The machine: what it is, how much memory and disk it has free, and memory given back to it."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__

SYSTEM = Path("/")
LIBRARIES = ("diffusers", "transformers", "torch-fidelity", "numpy", "scipy", "pillow")
KEPT_SHARE = 0.25
"""Share of the free memory that dequantized weights may take between calls; larger: more stay."""


def keeps(size: int) -> bool:
    """Whether that many bytes of dequantized weights are kept between calls.

    Otherwise every call makes them again: the same numbers, more slowly.
    """
    free = available_memory()
    return free is None or size <= KEPT_SHARE * free


def available_memory(root: Path = SYSTEM) -> int | None:
    """Bytes that a new process can have without swapping, within the limits of its control groups;
    None where the system does not say (it has no /proc)."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*found, *_of_groups(root)], default=None)


def device_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for the CPU, whose memory is the system's."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def _of_groups(root: Path) -> list[int]:
    """What the limits of this process' control groups, of either version, leave of memory."""
    top = root / "sys/fs/cgroup"
    names = {"0": ("memory.max", "memory.current"), "memory": _FIRST_VERSION}
    places = {"0": top, "memory": top / "memory"}
    try:
        entries = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for number, controllers, path in (entry.split(":", 2) for entry in entries):
        kind = "memory" if controllers == "memory" else number
        if kind not in names:
            continue
        group = places[kind] / path.lstrip("/")
        while group.is_relative_to(places[kind]):
            left = _left(group, *names[kind])
            found += [] if left is None else [left]
            group = group.parent
    return found


_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(group: Path, limit_name: str, used_name: str) -> int | None:
    """Bytes left of one group's limit, None without a limit.

    Pages of files that nobody works on can be given up and are not counted as used.
    """
    try:
        limit = (group / limit_name).read_text(encoding="ascii").strip()
        used = int((group / used_name).read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    values = dict(line.split(" ", 1) for line in stat)
    idle = int(values.get("total_inactive_file", values.get("inactive_file", 0)))
    return None if limit == "max" else max(0, int(limit) - used + idle)


def give_back() -> None:
    """Return to the system what this process has freed.

    glibc keeps freed tensors of up to 32 MB in its heap, in pieces between those that live: after
    all layers of a model, more than they hold. Elsewhere there is nothing to do.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def available_disk(folder: Path) -> int:
    """Bytes free where the folder is or would be made."""
    places = (folder.absolute(), *folder.absolute().parents)
    return shutil.disk_usage(next(place for place in places if place.is_dir())).free


def described() -> dict[str, Any]:
    """For reports: CPU, vector instructions and threads that torch uses, versions."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "qncd": __version__,
    }


def libraries() -> dict[str, str]:
    """Versions of what images and their numbers come from, by package; Python's among them."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
