"""GPTQ's statistics of inputs, and the target of full precision."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.quant.gptq import HessianAccumulator, asymmetric_target, kept_bytes
from qncd_cli.sampling.noise import generator_for


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
