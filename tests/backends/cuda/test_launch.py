"""Kernels of both kinds."""

from __future__ import annotations

from qncd_cli.backends.cuda import launch


def test_both_kinds_of_kernels_live_side_by_side():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    assert launch.interpreted()
    assert isinstance(launch.kernels(True).product, InterpretedFunction)
    assert isinstance(launch.kernels(False).product, JITFunction)
    assert launch.interpreted()
