"""GPTQ's statistics of inputs, and the target of full precision."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.quant.affine import QParams, fake_quantize, quantize_uint8
from qncd_cli.quant.gptq import HessianAccumulator, asymmetric_target, kept_bytes
from qncd_cli.sampling.noise import generator_for
from qncd_cli.spec import activation_spec


def test_the_asymmetric_target_brings_outputs_nearer_to_full_precision():
    generator = generator_for(9)
    full = torch.randn(4000, 24, generator=generator)
    mixing = torch.eye(24) + 0.1 * torch.randn(24, 24, generator=generator)
    x = full @ mixing + 0.05 * torch.randn(4000, 24, generator=generator)
    weight = torch.randn(6, 24, generator=generator)
    accumulator = HessianAccumulator(24)
    accumulator.update(x, torch.nn.Linear(24, 6), full=full)

    def error(strength):
        target = asymmetric_target(weight, accumulator.curvature(), strength)
        return float((x @ target.T - full @ weight.T).square().mean())

    assert torch.equal(asymmetric_target(weight, accumulator.curvature(), 0.0), weight)
    best = torch.linalg.lstsq(x, full @ weight.T).solution.T
    assert error(1.0) < 0.1 * error(0.0)
    assert error(1.0) == pytest.approx(
        float((x @ best.T - full @ weight.T).square().mean()), rel=0.1
    )


def test_parts_of_a_drift_merge_to_the_whole():
    generator, layer = generator_for(10), torch.nn.Linear(8, 2)
    x, full = torch.randn(2, 50, 8, generator=generator)
    whole, *parts = (HessianAccumulator(8) for _ in range(3))
    whole.update(x, layer, full=full)
    for part, rows in zip(parts, (slice(0, 20), slice(20, 50)), strict=True):
        part.update(x[rows], layer, full=full[rows])
    parts[0].merge(parts[1])
    for merged, expected in zip(parts[0].curvature(), whole.curvature(), strict=True):
        assert torch.allclose(merged, expected, atol=1e-5)


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("width", [8, 256, 600])
def test_another_accumulator_goes_on_from_half_a_hessian_to_the_same_bits(width, drift):
    generator, layer = generator_for(11), torch.nn.Linear(width, 2)
    batches = torch.randn(3, 20, width, generator=generator)
    whole, begun, other = (HessianAccumulator(width) for _ in range(3))
    for number, x in enumerate(batches):
        full = x + 0.1 if drift else None
        whole.update(x, layer, full=full)
        if number == 1:
            memory = begun.memory()
            kept = sum(t.nbytes for name, t in memory.items() if name != "count")
            assert (
                kept == kept_bytes(width, drift=drift) <= (0.75 + drift) * 4 * max(512, width) ** 2
            )
            other.restore(memory)
        (other if number else begun).update(x, layer, full=full)
    assert other.count == whole.count
    for went_on, expected in zip(other.curvature(), whole.curvature(), strict=True):
        assert went_on is expected is None or torch.equal(went_on, expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Linear(300, 2),
        torch.nn.Conv2d(30, 2, 3, padding=1),
        torch.nn.Conv2d(7, 2, 3, stride=2, padding=(1, 0)),
        torch.nn.Conv2d(5, 2, 1),
    ],
)
@pytest.mark.parametrize("zero_point", [0, 3, 15])
def test_codes_give_the_hessian_of_what_they_stand_for(layer, bits, zero_point):
    shape = (40, 300) if isinstance(layer, torch.nn.Linear) else (6, layer.in_channels, 9, 8)
    x = torch.randn(shape, generator=generator_for(12))
    qparams = QParams(torch.tensor(0.37), torch.tensor(zero_point, dtype=torch.int32))
    codes = quantize_uint8(x, float(qparams.scale), zero_point, bits)
    size = layer.weight[0].numel()
    ours, plain = HessianAccumulator(size), HessianAccumulator(size)
    ours.update_codes(codes, qparams, layer, 100, count=2.0)
    plain.update(2**0.5 * fake_quantize(x, qparams, activation_spec(bits)), layer, 100)
    assert ours.count == plain.count
    torch.testing.assert_close(ours.hessian(), plain.hessian(), rtol=1e-5, atol=1e-5)


def test_sums_of_the_largest_codes_fit_their_integers():
    """Codes of 255 at a zero-point of 0, more vectors than are summed at once."""
    layer, vectors = torch.nn.Linear(3, 1), 20000
    codes = torch.full((vectors, 3), 255, dtype=torch.uint8)
    found = HessianAccumulator(3)
    found.update_codes(codes, QParams(torch.tensor(1.0), torch.tensor(0)), layer)
    torch.testing.assert_close(found.hessian(), torch.full((3, 3), 2 * 255.0**2))
