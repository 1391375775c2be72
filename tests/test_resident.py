"""What the system says of this process's memory."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest

from qncd_cli.resident import forget_peak, peak_of_process, peak_resident, resident


@pytest.mark.skipif(resident() is None, reason="there is no /proc")
def test_the_peak_of_memory_is_forgotten():
    with mmap.mmap(-1, 64 << 20) as held:  # of the system itself, every page touched
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    before = peak_resident()
    assert before > resident() + (32 << 20)
    assert forget_peak()
    assert peak_resident() < before - (32 << 20)


@pytest.mark.skipif(resident() is None, reason="there is no /proc")
def test_the_peak_of_the_process_that_began_this_one_does_not_count():
    """The kernel's own ru_maxrss has it, and a plan in a large job would."""
    with mmap.mmap(-1, 256 << 20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        code = "from qncd_cli.resident import peak_of_process as peak; print(peak())"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert peak_of_process() > 256 << 20
    assert int(said.stdout) < 128 << 20
