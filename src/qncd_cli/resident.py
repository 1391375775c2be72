"""Memory that this process holds, as the system counts it. Nothing here needs torch."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

PROCESS = Path("/proc/self")


def resident() -> int | None:
    """Bytes of this process that are in memory; None where there is no /proc."""
    return _status("VmRSS")


def peak_resident() -> int | None:
    """The most bytes in memory since this process began or `forget_peak`; None without /proc."""
    return _status("VmHWM")


def peak_of_process() -> int:
    """`peak_resident` in bytes, everywhere: without /proc the system's own count, which may hold
    the peak of the process that began this one."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return peak_resident() or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> bool:
    """Let `peak_resident` begin again at what is in memory now; False where that cannot be."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(what: str) -> int | None:
    try:
        status = (PROCESS / "status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{what}:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else None
