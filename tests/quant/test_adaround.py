import pytest
import torch
from torch.nn import functional as F

from qncd_cli.quant.adaround import SoftRounding, undecided
from qncd_cli.quant.affine import QParams, dequantize, fake_quantize, round_straight_through
from qncd_cli.quant.rounding import round_gptq, round_nearest
from qncd_cli.spec import activation_spec, weight_spec


def correlated(rows, size, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator)
    return torch.randn(rows, size, generator=generator) @ mix


def random_weight(out, size, seed=1):
    return torch.randn(out, size, generator=torch.Generator().manual_seed(seed))


def output_error(x, weight, codes, rounded, spec):
    found = dequantize(codes, rounded.qparams, spec)
    return float((F.linear(x, weight) - F.linear(x, found)).square().mean())


def learn(x, weight, rounded, spec, iterations=300):
    """AdaRound on one linear layer, as the stage does it."""
    rounding = SoftRounding(weight, rounded.codes, rounded.qparams, spec)
    unit = output_error(x, weight, rounded.codes, rounded, spec)
    target = F.linear(x, weight)
    curvature = x.square().mean(0).sum() / len(weight) * rounded.qparams.scale.square().sum()
    strength = float(curvature / 8 / unit)  # of the squared error, see ptq/learn_block.py
    optimizer = torch.optim.Adam([rounding.logits], lr=2e-2)
    for _ in range(iterations):
        share = rounding.up_share()
        loss = (F.linear(x, rounding.soft_weight(share)) - target).square().mean() / unit
        loss = loss + strength * undecided(share) / share.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rounding.codes()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_start_is_the_codes_given_and_every_reachable_code_is_in_range(bits):
    spec = weight_spec(bits)
    weight = random_weight(6, 50)
    weight[0] = 0
    qparams = round_nearest(weight, spec).qparams
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(spec.qmin, spec.qmax + 1, weight.shape, generator=generator)
    rounding = SoftRounding(weight, anywhere, qparams, spec)
    assert torch.equal(rounding.codes(), anywhere.to(torch.int32))
    for extreme in (-1e4, 1e4):
        rounding.logits.data.fill_(extreme)
        assert rounding.codes().min() >= spec.qmin
        assert rounding.codes().max() <= spec.qmax


def test_the_other_code_within_reach_lies_towards_the_weight():
    spec = weight_spec(4)
    qparams = QParams(torch.ones(1), torch.full((1,), 8, dtype=torch.int32))
    weight = torch.tensor([[0.3, 0.3, 0.3, 3.0, -20.0, 20.0]])
    start = torch.tensor([[8, 9, 10, 8, 0, 15]])
    rounding = SoftRounding(weight, start, qparams, spec)
    assert torch.equal(rounding.base, torch.tensor([[8, 8, 9, 8, 0, 14]], dtype=torch.int32))


def test_codes_out_of_range_are_refused():
    spec = weight_spec(4)
    weight = random_weight(2, 4)
    rounded = round_nearest(weight, spec)
    with pytest.raises(ValueError, match="outside"):
        SoftRounding(weight, rounded.codes + 16, rounded.qparams, spec)


def test_hard_logits_give_the_weight_of_the_codes():
    spec = weight_spec(3)
    weight = random_weight(4, 9).reshape(4, 1, 3, 3)
    rounded = round_nearest(weight, spec)
    rounding = SoftRounding(weight, rounded.codes, rounded.qparams, spec)
    rounding.logits.data = torch.where(rounding.logits >= 0, 1e4, -1e4)
    soft = rounding.soft_weight(rounding.up_share())
    assert torch.equal(soft, dequantize(rounding.codes(), rounded.qparams, spec))


def test_the_gradient_reaches_the_logits_through_quantized_inputs_and_two_layers():
    spec, inputs = weight_spec(4), activation_spec(8)
    x = correlated(64, 12, seed=0)
    first, second = random_weight(10, 12), random_weight(5, 10, seed=2)
    rounded = [round_nearest(w, spec) for w in (first, second)]
    rounding = [
        SoftRounding(w, r.codes, r.qparams, spec)
        for w, r in zip((first, second), rounded, strict=True)
    ]
    hidden = F.silu(F.linear(x, rounding[0].soft_weight(rounding[0].up_share())))
    qparams = QParams(torch.tensor(0.1), torch.tensor(8))
    output = F.linear(
        fake_quantize(hidden, qparams, inputs), rounding[1].soft_weight(rounding[1].up_share())
    )
    output.square().mean().backward()
    for part in rounding:
        assert (part.logits.grad != 0).float().mean() > 0.9


def test_straight_through_rounding_rounds_exactly():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 300
    x = torch.cat([x, torch.tensor([0.5, 1.5, -0.5, 0.0, 1e-30, 2.0**22 + 0.5, 3e9])])
    learnt = x.clone().requires_grad_()
    found = round_straight_through(learnt)
    assert torch.equal(found.detach(), torch.round(x))
    found.sum().backward()
    assert torch.equal(learnt.grad, torch.ones_like(x))


def test_the_regulariser_is_zero_where_decided_and_highest_in_the_middle():
    assert undecided(torch.tensor([0.0, 1.0, 1.0])) == 0
    assert undecided(torch.tensor([0.5, 0.5])) == 2
    assert undecided(torch.tensor([0.75])) == 0.75


@pytest.mark.parametrize("bits", [3, 4])
def test_learnt_rounding_beats_nearest_and_gptq_on_correlated_inputs(bits):
    spec = weight_spec(bits)
    x, weight = correlated(600, 60, seed=bits), random_weight(16, 60)
    nearest = round_nearest(weight, spec)
    gptq, _ = round_gptq(weight, spec, 2 * x.T @ x / len(x))
    errors = {}
    for name, start in (("nearest", nearest), ("gptq", gptq)):
        before = output_error(x, weight, start.codes, start, spec)
        codes = learn(x, weight, start, spec)
        errors[name] = before, output_error(x, weight, codes, start, spec)
    assert errors["nearest"][1] < 0.6 * errors["nearest"][0]
    assert errors["gptq"][1] < errors["gptq"][0]
    assert errors["gptq"][1] < 0.5 * errors["nearest"][0]
