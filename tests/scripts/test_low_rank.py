"""scripts/low_rank.py: the branch is the best of its rank on the layer's own objective."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "low_rank.py"


@pytest.fixture(scope="module")
def best_branch():
    spec = importlib.util.spec_from_file_location("low_rank", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["low_rank"] = module
    spec.loader.exec_module(module)
    return module.best_branch


def made():
    """residual [6, 10], Hessian [10, 10] far from a multiple of the identity."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator) * torch.logspace(-1, 1, 10)
    return torch.randn(6, 10, generator=generator), x.T @ x


def error(residual, branch, hessian):
    left = residual - branch
    return float(((left @ hessian) * left).sum())


def test_full_rank_leaves_nothing(best_branch):
    residual, hessian = made()
    torch.testing.assert_close(best_branch(residual, hessian, 6), residual)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_branch_of_its_rank_is_better(best_branch, rank):
    residual, hessian = made()
    branch = best_branch(residual, hessian, rank)
    assert torch.linalg.matrix_rank(branch, rtol=1e-4) == rank
    best = error(residual, branch, hessian)
    u, s, v = torch.linalg.svd(residual)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert best < error(residual, plain, hessian)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        nudge = 1e-2 * torch.randn(6, 6, generator=generator)
        assert best <= error(residual, branch + nudge @ branch, hessian) * (1 + 1e-3)
