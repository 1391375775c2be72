"""What a run's artifacts tell, beside sums made here from the pairs themselves."""

from __future__ import annotations

import math

import pytest
import torch

from qncd_cli.correction.offline import AffineCorrection, PtqdCorrection
from qncd_cli.correction.statistics import NoiseStatistics
from qncd_cli.report.insight import (
    AFTER,
    BEFORE,
    HEAT,
    block_of,
    channel_ranges,
    network,
    noise_curves,
)


def test_noise_before_and_after_each_offline_correction_is_that_of_the_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    statistics, pairs = NoiseStatistics(), {}
    for t in (1, 500):
        eps = torch.randn(16, 3, 8, 8, generator=generator)
        noise = 0.1 * eps + 0.05 * torch.randn(eps.shape, generator=generator) + 0.02
        pairs[t] = eps, eps + noise
        statistics.update(t, *pairs[t])
    tensors = statistics.finish()
    curves = noise_curves(tensors)
    assert curves.timesteps == [500, 1], "in the order of sampling"
    ptqd, affine = PtqdCorrection(tensors).correct, AffineCorrection(tensors).correct
    for place, t in enumerate(curves.timesteps):
        eps, noisy = pairs[t]
        step = type("Step", (), {"t": float(t)})
        corrected = {
            "no correction": noisy,
            "ptqd": ptqd(step, noisy),
            "affine": affine(step, noisy),
        }
        assert corrected.keys() == curves.mean.keys() == curves.spread.keys()
        for name, prediction in corrected.items():
            left = (prediction - eps).transpose(0, 1).flatten(1).double()
            mean = left.mean(1).square().mean().sqrt()
            assert curves.mean[name][place] == pytest.approx(float(mean), abs=1e-5)
            spread = left.var(1, correction=0).mean().sqrt()
            assert curves.spread[name][place] == pytest.approx(float(spread), rel=1e-2)


def test_no_noise_was_measured_where_there_are_no_steps() -> None:
    assert noise_curves({"timesteps": torch.zeros(0, dtype=torch.int64)}) is None


def _row(name: str, weights: int, activations: int, why: str = "") -> dict:
    return {
        "name": name,
        "kind": "conv",
        "macs": 100,
        "weight_bits": weights,
        "activation_bits": activations,
        "why_not_integer": why,
    }


ROWS = [
    _row("conv_in", 15, 16),
    _row("down_blocks.0.resnets.0.conv1", 4, 8),
    _row("down_blocks.0.resnets.0.conv2", 4, 8),
    _row("down_blocks.0.resnets.0.time_emb_proj", 32, 32, "depends on the timestep alone"),
]


def test_the_map_has_bits_of_every_layer_and_the_worst_first() -> None:
    entries = {
        "down_blocks.0.resnets.0.conv1": {"estimated_error": {"input": 0.01, "weight": 0.03}},
        "down_blocks.0.resnets.0.conv2": {"estimated_error": {"input": 0.3, "weight": 0.1}},
        "conv_in": {"relative_output_error": 0.5},
    }
    found = network({"layers": ROWS}, entries)
    assert list(found.blocks) == ["conv_in", "down_blocks.0"]
    assert [layer.name.rpartition(".")[2] for layer in found.worst] == ["conv2", "conv1"]
    first, second, last = found.blocks["down_blocks.0"]
    assert (first.bits, last.bits) == ("W4A8", "float")
    assert second.error == pytest.approx(0.4) and second.heat == HEAT - 1
    assert first.heat == HEAT - 2, "10 dB below the worst"
    assert last.error is None and last.heat == 0 and last.why
    assert second.share == 0.25 and second.error_db == pytest.approx(10 * math.log10(0.4))


def test_without_estimates_the_map_shows_what_rounding_left() -> None:
    entries = {"conv_in": {"relative_output_error": 0.5}}
    found = network({"layers": ROWS}, entries)
    assert [layer.name for layer in found.worst] == ["conv_in"]
    assert "own output" in found.error_says
    assert network({"layers": ROWS}, {}).error_says == ""


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("down_blocks.1.attentions.0.proj_in", "down_blocks.1"),
        ("mid_block.resnets.0.conv1", "mid_block"),
        ("transformer_blocks.3.attn.to_q", "transformer_blocks.3"),
        ("conv_out", "conv_out"),
    ],
)
def test_the_block_of_a_layer(name: str, block: str) -> None:
    assert block_of(name) == block


def test_ranges_before_smoothing_are_what_calibration_saw_times_the_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(200, generator=generator) + 0.5
    factor = torch.ones(200)
    factor[17] = 30.0
    calibration = {f"{n}.input_channel_absmax": seen for n in ("a", "b", "c")}
    smoothing = {
        "a.smoothing": torch.ones(200),
        "b.smoothing": factor,
        "c.smoothing": factor,
        "c.shift": torch.ones(200),
        "d.smoothing": factor,
    }
    found = channel_ranges(calibration, smoothing)
    assert [ranges.name for ranges in found] == ["b", "a"], "shifted and unseen ones left out"
    worst = found[0]
    assert worst.widest[0] == pytest.approx(float(30 * seen[17] / (seen * factor).median()))
    assert worst.widest[1] == pytest.approx(float(seen.max() / seen.median()))
    assert worst.curves[BEFORE] == sorted(worst.curves[BEFORE], reverse=True)
    assert len(worst.curves[AFTER]) == 64
    assert worst.curves[AFTER][-1] == pytest.approx(float(seen.min() / seen.median()))
