"""A denoiser that leaves work out: what stands for kept values, and the order it insists on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qncd_cli.errors import ConfigError
from qncd_cli.models.loading import load_model
from qncd_cli.quant.layers import StepState
from qncd_cli.runtime.denoiser import Denoiser
from qncd_cli.runtime.reuse import History, Pattern, ReusingDenoiser, SiteTerms, sites_of

TIMES = (300.0, 200.0, 100.0)


@pytest.fixture(scope="module", params=["tiny_model", "tiny_dit_model"])
def model(request):
    return load_model(str(request.getfixturevalue(request.param)))


def reusing(model, kept, terms=None, rows=None) -> ReusingDenoiser:
    inner = Denoiser(copy.deepcopy(model.denoiser), StepState())
    return ReusingDenoiser(inner, Pattern(TIMES, kept), terms, rows=rows)


def drawn(denoiser, model, rows=slice(0, 3)):
    """Predictions at all times, of inputs that move."""
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(len(TIMES), 3, *model.latent_shape, generator=generator)
    condition = model.condition(torch.arange(3)[rows])
    return torch.stack([denoiser(x[rows], t, condition) for x, t in zip(xs, TIMES, strict=True)])


def everything(model) -> frozenset[str]:
    return frozenset(sites_of(model.denoiser))


def test_a_pattern_that_keeps_nothing_changes_no_bit(model):
    plain = Denoiser(model.denoiser, StepState())
    found = drawn(reusing(model, (frozenset(),) * 3), model)
    assert torch.equal(found, drawn(plain, model))


def test_a_kept_step_is_another_one_and_the_steps_around_it_are_not(model):
    plain = drawn(Denoiser(model.denoiser, StepState()), model)
    found = drawn(reusing(model, (frozenset(), everything(model), frozenset())), model)
    assert torch.equal(found[::2], plain[::2])
    assert not torch.allclose(found[1], plain[1], atol=1e-4)


def test_a_row_is_the_same_in_every_batch(model):
    kept = (frozenset(), everything(model), everything(model))
    whole = drawn(reusing(model, kept), model)
    torch.testing.assert_close(drawn(reusing(model, kept, rows=2), model), whole)
    alone = drawn(reusing(model, kept), model, slice(1, 2))
    torch.testing.assert_close(alone, whole[:, 1:2])


def test_a_second_trajectory_knows_nothing_of_the_first(model):
    kept = (frozenset(), everything(model), everything(model))
    denoiser = reusing(model, kept)
    assert torch.equal(drawn(denoiser, model), drawn(denoiser, model))


def test_another_order_another_batch_and_other_timesteps_are_refused(model):
    kept = (frozenset(), everything(model), frozenset())
    denoiser = reusing(model, kept)
    x, condition = torch.zeros(1, *model.latent_shape), model.condition(torch.tensor([0]))
    denoiser(x, TIMES[0], condition)
    with pytest.raises(ConfigError, match="step 3 of a trajectory follows step 1"):
        denoiser(x, TIMES[2], condition)
    with pytest.raises(ConfigError, match="kept values would be another step's"):
        denoiser(torch.cat([x, x]), TIMES[1], model.condition(torch.tensor([0, 1])))
    with pytest.raises(ConfigError, match="timestep 150 is none of the 3 of the reuse plan"):
        denoiser(x, 150.0, condition)


@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 2, 2), 1), ((4, 5, 3), 2)])
def test_what_stands_for_a_value_is_affine_in_it_and_its_last_change(shape, axis):
    generator = torch.Generator().manual_seed(0)
    earlier, latest = torch.randn(2, *shape, generator=generator)
    a, d, b = torch.randn(3, 2, 3, generator=generator)
    history = History()
    history.add(earlier)
    history.add(latest)
    found = history.estimate(SiteTerms(a, d, b), axis)
    shown = [1] * len(shape)
    shown[axis] = 3
    for part, rows in enumerate((slice(0, 2), slice(2, 4))):  # null class and others
        here, before = latest[rows], earlier[rows]
        factor, slope, offset = (v[part].reshape(shown) for v in (a, d, b))
        expected = (1 + factor) * here + slope * (here - before) + offset
        torch.testing.assert_close(found[rows], expected)


def test_terms_of_zeros_and_no_terms_are_the_value_itself():
    history = History([torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)])
    zeros = SiteTerms(*[torch.zeros(1, 3)] * 3)
    assert torch.equal(history.estimate(zeros, 1), history.values[0])
    assert history.estimate(None, 1) is history.values[0]


def test_a_value_without_one_before_has_no_slope():
    history = History([torch.randn(2, 3, 2, 2)])
    assert not history.slope.any()


def test_a_model_without_sites_has_none():
    assert sites_of(nn.Linear(2, 2)) == {}
