"""The step-wise correction, fitted and applied on analytic denoisers with planted noise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from analytic import DDIM, LDM, SEEDS, STEPS, distance, gaussian, sample

from qncd_cli.correction.stepwise import StepwiseCorrection, StepwiseFit, fit_terms
from qncd_cli.errors import ConfigError
from qncd_cli.sampling.noise import generator_for
from qncd_cli.sampling.parametrization import path_scale, prediction_type
from qncd_cli.sampling.response import responses
from qncd_cli.sampling.samplers import make_scheduler, to_vp

CALIBRATION = range(100, 124)
FULL = gaussian(0.8)


def wave(x, t):
    """An offset that depends on the position, as patterns of padding do."""
    height, width = x.shape[2:]
    rows = torch.linspace(0, torch.pi, height).sin().view(-1, 1)
    return 0.1 * rows * torch.linspace(-1, 1, width)


def quantized(x, t):
    """Planted noise: a factor, an offset, a pattern, and what is of each sample alone."""
    own = torch.randn(x.shape, generator=generator_for(int(t)))
    return gaussian(0.8, bias=0.06, k=-0.04)(x, t) + wave(x, t) + 0.03 * own


def goals(predict, seeds, scheduler=DDIM, eta=0.0):
    kind, passed = prediction_type(scheduler), []
    end = sample(
        predict,
        seeds=seeds,
        eta=eta,
        scheduler=scheduler,
        on_step=lambda i, t, x, prediction: passed.append(x.clone()),
    )
    assert path_scale(0.5, kind) == 1
    return torch.stack([*passed[1:], end * to_vp(scheduler, 1.0, kind)])


def fitted(predict, scheduler=DDIM, seeds=CALIBRATION, eta=0.0):
    """Statistics of `predict` against FULL, and the latents that the fit itself ended at."""
    fit = StepwiseFit(goals(FULL, seeds, scheduler, eta), responses(scheduler, STEPS, eta))
    end = sample(predict, fit, seeds, eta=eta, scheduler=scheduler)
    return fit.statistics(), end


@pytest.fixture(scope="module")
def statistics():
    return fitted(quantized)[0]


def test_it_brings_unseen_trajectories_back(statistics):
    wanted = sample(FULL)
    plain = distance(sample(quantized), wanted)
    corrected = distance(sample(quantized, StepwiseCorrection(statistics)), wanted)
    assert corrected < 0.15 * plain


def test_its_terms_have_one_row_per_step_and_a_small_field(statistics):
    assert statistics["stepwise_prediction"].shape == (STEPS, 3)
    assert statistics["stepwise_latent"].shape == (STEPS, 3)
    assert statistics["stepwise_field"].shape == (STEPS, 3, 8, 8)
    assert all(value.dtype == torch.float32 for value in statistics.values())


def test_a_full_precision_model_is_left_as_it_is():
    statistics, end = fitted(FULL)
    assert all(not value.any() for value in statistics.values())
    assert torch.equal(end, sample(FULL, seeds=CALIBRATION))
    assert torch.equal(sample(FULL, StepwiseCorrection(statistics)), sample(FULL))


def test_noise_that_differs_from_sample_to_sample_is_left_alone():
    calls = iter(range(10_000))

    def noisy(x, t):
        return FULL(x, t) + 0.1 * torch.randn(x.shape, generator=generator_for(next(calls)))

    statistics, _ = fitted(noisy)
    plain, wanted = sample(noisy), sample(FULL)
    corrected = distance(sample(noisy, StepwiseCorrection(statistics)), wanted)
    assert corrected < 1.02 * distance(plain, wanted)


def test_later_steps_are_fitted_on_what_earlier_ones_have_mended(statistics):
    last = statistics["stepwise_prediction"][-1].abs().max()
    first = statistics["stepwise_prediction"][0].abs().max()
    assert last < 2 * first  # an uncorrected trajectory would be far away by then


@pytest.mark.parametrize(
    ("name", "eta"),
    [("ddim", 0.0), ("ddim", 1.0), ("euler", 0.0), ("dpmsolver++", 0.0), ("plms", 0.0)],
)
def test_every_kind_of_sampler_is_brought_back(name, eta):
    scheduler = make_scheduler(name, LDM)
    statistics, _ = fitted(quantized, scheduler, eta=eta)
    wanted = sample(FULL, scheduler=scheduler, eta=eta)
    plain = distance(sample(quantized, scheduler=scheduler, eta=eta), wanted)
    corrected = sample(quantized, StepwiseCorrection(statistics), scheduler=scheduler, eta=eta)
    assert distance(corrected, wanted) < 0.3 * plain


def test_a_response_says_what_one_unit_of_the_prediction_adds():
    for name in ("ddim", "dpmsolver++", "unipc", "pndm", "euler"):
        scheduler = make_scheduler(name, LDM)
        found = responses(scheduler, STEPS)
        shift = 1e-3
        moved = StepwiseCorrection(
            {
                "stepwise_prediction": torch.zeros(len(found), 3),
                "stepwise_latent": torch.zeros(len(found), 3),
                "stepwise_field": shift
                * torch.eye(len(found))[-1].view(-1, 1, 1, 1).expand(-1, 3, 8, 8),
            }
        )
        change = sample(FULL, moved, scheduler=scheduler) - sample(FULL, scheduler=scheduler)
        assert change.mean().item() == pytest.approx(found[-1] * shift, rel=0.02), name


def test_a_fit_that_does_not_carry_over_is_nothing():
    generator = generator_for(3)
    wanted, eps, x = torch.randn(3, 8, 2, 4, 4, generator=generator)
    signs = torch.tensor([1.0, -1.0]).repeat(4).view(-1, 1, 1, 1)
    terms = fit_terms(wanted * signs, eps, x)
    assert terms.added(eps, x).square().mean() < 0.02 * wanted.square().mean()


def test_a_field_of_one_value_is_an_offset_per_channel_and_leaves_patterns():
    generator = generator_for(6)
    eps, x = torch.randn(2, 16, 3, 24, 24, generator=generator)
    wanted = 0.2 * eps - 0.1 * x + 0.3 + wave(x, 0)
    flat, fine = (fit_terms(wanted, eps, x, field) for field in (1, 8))
    assert flat.field.shape == (3, 1, 1)
    assert torch.allclose(flat.added(eps, x), wanted - wave(x, 0), atol=5e-3)
    left = [(terms.added(eps, x) - wanted).square().mean() for terms in (flat, fine)]
    assert left[1] < 0.1 * left[0]


def test_one_trajectory_gives_no_terms():
    wanted, eps, x = torch.randn(3, 1, 2, 4, 4, generator=generator_for(4))
    assert not fit_terms(wanted, eps, x).added(eps, x).any()


def test_latents_that_are_no_images_have_an_offset_per_channel():
    generator = generator_for(5)
    eps, x = torch.randn(2, 8, 4, 50, generator=generator)
    terms = fit_terms(0.2 * eps - 0.1 * x + 0.3, eps, x)
    assert terms.field.shape == (4, 1)
    assert torch.allclose(terms.added(eps, x), 0.2 * eps - 0.1 * x + 0.3, atol=2e-3)


def test_more_steps_than_were_fitted_are_refused(statistics):
    step = SimpleNamespace(index=STEPS, x=torch.zeros(1, 3, 24, 24))
    with pytest.raises(ConfigError, match=f"has {STEPS} steps, this is number {STEPS + 1}"):
        StepwiseCorrection(statistics).correct(step, torch.zeros(1, 3, 24, 24))


def test_samples_do_not_depend_on_their_batch(statistics):
    together = sample(quantized_alone, StepwiseCorrection(statistics))
    alone = [sample(quantized_alone, StepwiseCorrection(statistics), [seed]) for seed in SEEDS]
    assert torch.equal(together, torch.cat(alone))


def quantized_alone(x, t):
    return gaussian(0.8, bias=0.06, k=-0.04)(x, t)
