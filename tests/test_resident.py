"""What the system says of this process's memory."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.resident import forget_peak, peak_resident, resident


@pytest.mark.skipif(resident() is None, reason="there is no /proc")
def test_the_peak_of_memory_is_forgotten():
    held = torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
    del held
    before = peak_resident()
    assert before > resident() + (32 << 20)
    assert forget_peak()
    assert peak_resident() < before - (32 << 20)
