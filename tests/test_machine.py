"""Memory and disk that a command may take: what the system has, less what others hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from qncd_cli.machine import available_disk, available_memory


def test_available_memory_is_less_than_the_machine_has():
    total = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < available_memory() < total


def test_available_disk_is_that_of_the_nearest_folder(tmp_path):
    there, to_be = tmp_path, tmp_path / "not" / "yet"
    assert available_disk(to_be) == pytest.approx(available_disk(there), rel=0.1)


def system(root: Path, cgroup: str, **files: str) -> Path:
    """A system with 8 GB free. files: by their place below /sys/fs/cgroup, "__" for "/"."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        folder, _, last = name.rpartition("__")
        path = root / "sys/fs/cgroup" / folder.replace("__", "/") / last.replace("_0_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FREE = 8_192_000_000


def test_without_limits_memory_is_what_the_system_has(tmp_path):
    assert available_memory(system(tmp_path, "")) == FREE
    assert available_memory(tmp_path / "other") is None  # no /proc


@pytest.mark.parametrize("limit", ["max\n", "900000000000\n"])
def test_a_wide_limit_changes_nothing(tmp_path, limit):
    files = {"memory_0_max": limit, "memory_0_current": "5", "memory_0_stat": "inactive_file 1"}
    found = system(tmp_path, "0::/\n", **{f"job__{name}": text for name, text in files.items()})
    assert available_memory(found) == FREE


@pytest.mark.parametrize(
    ("cgroup", "folder", "names", "idle"),
    [
        ("0::/job/step\n", "job", ("memory_0_max", "memory_0_current"), "inactive_file"),
        ("0::/\n", "", ("memory_0_max", "memory_0_current"), "inactive_file"),
        (
            "9:cpu:/\n4:memory:/job\n0::/\n",
            "memory__job",
            ("memory_0_limit_in_bytes", "memory_0_usage_in_bytes"),
            "inactive_file 1\ntotal_inactive_file",
        ),
    ],
    ids=["a group above", "a container", "first version"],
)
def test_a_control_groups_limit_counts_and_file_pages_can_be_given_up(
    tmp_path, cgroup, folder, names, idle
):
    files = dict(zip(names, ("3000000000\n", "1500000000\n"), strict=True))
    files["memory_0_stat"] = f"anon 5\n{idle} 400000000\n"
    below = f"{folder}__" if folder else ""
    root = system(tmp_path, cgroup, **{f"{below}{name}": text for name, text in files.items()})
    assert available_memory(root) == 1_900_000_000
