"""What the system says of this process's memory."""

from __future__ import annotations

import mmap

import pytest

from qncd_cli.resident import forget_peak, peak_resident, resident


@pytest.mark.skipif(resident() is None, reason="there is no /proc")
def test_the_peak_of_memory_is_forgotten():
    with mmap.mmap(-1, 64 << 20) as held:  # of the system itself, every page touched
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    before = peak_resident()
    assert before > resident() + (32 << 20)
    assert forget_peak()
    assert peak_resident() < before - (32 << 20)
