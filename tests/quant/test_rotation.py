"""Rotations by a regular Hadamard matrix: orthogonal, their own inverse, the same bits anywhere."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.quant.affine import choose_qparams, fake_quantize
from qncd_cli.quant.rotation import ROTATIONS, rotate, rotation_matrix
from qncd_cli.quant.smoothing import SmoothingFactor
from qncd_cli.spec import activation_spec


@pytest.mark.parametrize("group", ROTATIONS)
def test_it_is_a_symmetric_hadamard_matrix_with_equal_sums(group):
    matrix = rotation_matrix(group)
    assert torch.equal(matrix @ matrix.T, torch.eye(group))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.abs(), torch.full_like(matrix, group**-0.5))
    assert torch.equal(matrix.sum(1), torch.ones(group))


@pytest.mark.parametrize("group", ROTATIONS)
def test_groups_are_rotated_by_themselves_and_a_batch_changes_no_bit(group):
    x = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(0))
    wanted = x.double().reshape(5, 7, -1, group) @ rotation_matrix(group).double()
    assert torch.allclose(rotate(x, group).double(), wanted.reshape(x.shape), atol=1e-5)
    assert torch.equal(rotate(x, group)[2:3], rotate(x[2:3], group))


def test_a_rotated_layer_computes_the_same():
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(9, 32, generator=generator), torch.randn(5, 32, generator=generator)
    scale = torch.rand(32, generator=generator) + 0.5
    factor = SmoothingFactor(scale, 0, rotation=16)
    y = factor.apply(x, -1) @ factor.fold(weight).T
    assert torch.allclose(y, x @ weight.T, atol=1e-4)
    assert torch.allclose(factor.unfold(factor.fold(weight)), weight, atol=1e-5)
    assert torch.allclose(factor.scaled_back(factor.apply(x, -1), -1), x, atol=1e-5)


def test_an_outlier_costs_less_after_rotation():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    x[:, 5] *= 30

    def error(factor):
        y, spec = factor.apply(x, -1), activation_spec(4)
        rounded = fake_quantize(y, choose_qparams(y.min(), y.max(), spec), spec)
        return factor.scaled_back(rounded - y, -1).square().mean()

    plain, rotated = (SmoothingFactor(torch.ones(64), 0, rotation=group) for group in (0, 16))
    assert error(rotated) < 0.7 * error(plain)


def test_a_factor_is_what_its_tensors_say():
    factor = SmoothingFactor(torch.ones(32), 0, rotation=16)
    found = SmoothingFactor.of(factor.tensors())
    assert (found.rotation, found.shift) == (16, None)
    assert torch.equal(found.factor, factor.factor)


@pytest.mark.parametrize(("group", "channels"), [(8, 32), (16, 24), (-4, 32)])
def test_a_rotation_that_there_is_not_is_refused(group, channels):
    tensors = {"smoothing": torch.ones(channels), "rotation": torch.tensor([group])}
    with pytest.raises(ValueError, match=f"no rotation of {channels} channels in groups of"):
        SmoothingFactor.of(tensors)
