"""Kernels of these tests are interpreted on the CPU, unless a test says otherwise."""

from __future__ import annotations

import pytest

from qncd_cli.backends import onednn

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _simulated_as_on_a_gpu(monkeypatch):
    """Products of a GPU do not saturate: the simulation beside them takes weights whole, also where
    this CPU could not."""
    monkeypatch.setattr(onednn, "saturates", lambda: False)
