"""Guidance in one call, for the whole batch and for its first rows."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.sampling.guidance import guided

N = 5
OWN = {"a": torch.arange(N * 2.0).reshape(N, 2), "b": torch.arange(N)}
NULL = {"a": -torch.ones(N, 2), "b": torch.full((N,), 9)}
T = torch.tensor(3.0)


class Denoiser:
    """Row by row; remembers how many rows it was called with."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, condition):
        assert {len(value) for value in condition.values()} == {len(x)}
        self.rows.append(len(x))
        return x * t + condition["a"] + condition["b"].reshape(-1, 1)


@pytest.mark.parametrize(("scale", "null"), [(3.0, NULL), (0.0, NULL), (3.0, None)])
@pytest.mark.parametrize("rows", [1, 2, N])
def test_first_rows_have_the_prediction_that_they_have_in_the_batch(scale, null, rows):
    denoiser = Denoiser()
    predict = guided(denoiser, OWN, null, scale)
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predict(x[:rows], T), predict(x, T)[:rows])
    halves = 2 if null is not None else 1
    assert denoiser.rows == [halves * rows, halves * N]


def test_both_halves_are_guided_apart():
    x = torch.zeros(N, 2)
    of_null, of_own = (Denoiser()(x, T, condition) for condition in (NULL, OWN))
    expected = of_null + 2.0 * (of_own - of_null)
    assert torch.equal(guided(Denoiser(), OWN, NULL, 2.0)(x, T), expected)
