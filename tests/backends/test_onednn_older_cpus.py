"""The integer kernels as they are on CPUs without VNNI and AVX-512, whatever this one has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qncd_cli.backends import onednn
from qncd_cli.backends.compiled import graph

HERE = Path(__file__).parent
OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
why = onednn.why_unusable()
if not why and torch.backends.cpu.get_cpu_capability() == "AVX2":
    why = "this is such a CPU, where all tests look at them"
pytestmark = pytest.mark.skipif(bool(why), reason=why)


def run(*arguments: str) -> str:
    """What pytest prints in a process of an older CPU; it has to succeed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", *arguments]
    here = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, env=here | OLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_products_are_exact_where_two_are_added_in_16_bits():
    code = "from qncd_cli.backends import onednn; print(onednn.saturates())"
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, env=os.environ | OLDER, text=True)
    assert printed == "True\n"
    wanted = "largest_products or simulation_says or half_precision"
    assert " passed" in run(str(HERE / "test_int8.py"), "-k", wanted)


@pytest.mark.slow
@pytest.mark.timeout(600)  # for the compiler
@pytest.mark.skipif(bool(graph.why_unavailable()), reason=graph.why_unavailable())
def test_operators_of_graphs_have_vectors_of_eight_numbers():
    assert " passed" in run(str(HERE / "compiled" / "test_ops.py"))
