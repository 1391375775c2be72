"""Attention between the artifacts: ranges from statistics, processors and coverage from ranges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_config
from diffusers.models.attention_processor import AttnProcessor2_0

from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ArtifactError
from qncd_cli.models.loading import load_model
from qncd_cli.models.topology import attention_sites, capture_attention
from qncd_cli.ptq.attention import operand_observers, quantize_attention
from qncd_cli.ptq.coverage import coverage
from qncd_cli.quant.attention_processors import QuantizedAttnProcessor
from qncd_cli.quant.layers import StepState
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.runtime.install import install_attention
from qncd_cli.store.artifacts import Artifact
from qncd_cli.store.layer_entry import AttentionEntry, bodies

BLOCK = "mid_block.attentions.0.transformer_blocks.0"


class OtherProcessor(AttnProcessor2_0):
    """Computes the same, but nobody can know that."""


@pytest.fixture
def model(tiny_model):
    return load_model(str(tiny_model))


def configured(tiny_model, bits=8, p_bits=8, **activations):
    tree = tiny_config(tiny_model)
    tree["quantization"]["attention"] = {"bits": bits, "probabilities_bits": p_bits}
    tree["quantization"]["activations"] |= activations
    return parse_config(tree, "here")


def predict(model, denoiser: Callable, t: float = 500.0) -> torch.Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return denoiser(x, torch.tensor(t), model.condition(torch.tensor([0, 1])))


def observed(model) -> Artifact:
    """Statistics of one call, in both of two timestep groups; twice as wide in the second."""
    sites = attention_sites(model.denoiser)
    observers = operand_observers(sites, 2)

    def see(name: str, x: torch.Tensor) -> None:
        observers[name].update(x, 0)
        observers[name].update(2 * x, 1)

    bare = quantized_denoiser(model, holding({}, {}), "simulate", False)
    with capture_attention(bare.module, sites, see):
        predict(model, bare)
    tensors = {f"{n}_{part}": v for n, o in observers.items() for part, v in o.state().items()}
    body = {"attention": {site.name: site.channels for site in sites}}
    return Artifact("calibration", tensors, body, "", "")


def holding(tensors: dict, entries: dict[str, AttentionEntry]) -> Artifact:
    body = {"layers": {}, "attention": bodies(entries), "groups": 2, "group_bounds": [400.0]}
    return Artifact("quantized", tensors, body, "", "")


def test_ranges_are_those_of_the_observed_operands(model, tiny_model):
    calibration = observed(model)
    config = configured(tiny_model, bits=6, observer="minmax")
    tensors, entries = quantize_attention(config, calibration)
    assert set(entries) == {site.name for site in attention_sites(model.denoiser)}
    assert f"{BLOCK}.attn2" in entries, "cross-attention too"
    assert len(tensors) == 6 * len(entries)
    for operand in ("query", "key", "value"):
        name = f"{BLOCK}.attn1.{operand}"
        low, high = (calibration.tensors[f"{name}_{end}"] for end in ("min", "max"))
        assert torch.allclose(tensors[f"{name}_scale"], (high - low) / 63)
        assert torch.equal(tensors[f"{name}_zero_point"], torch.round(-63 * low / (high - low)))


def test_the_configured_observer_chooses_the_ranges(model, tiny_model):
    calibration = observed(model)
    ranges = [
        quantize_attention(configured(tiny_model, observer=o, percentile=90.0), calibration)[0]
        for o in ("minmax", "percentile")
    ]
    name = f"{BLOCK}.attn1.query_scale"
    assert (ranges[1][name] < 0.9 * ranges[0][name]).all()


@pytest.mark.parametrize(("bits", "p_bits"), [(8, 8), (2, 8), (32, 2), (32, 32)])
def test_the_denoiser_computes_with_the_operands_of_the_artifact(model, tiny_model, bits, p_bits):
    tensors, entries = quantize_attention(configured(tiny_model, bits, p_bits), observed(model))
    denoiser = quantized_denoiser(model, holding(tensors, entries), "simulate", False)
    processors = [m for m in denoiser.module.modules() if isinstance(m, QuantizedAttnProcessor)]
    if bits == p_bits == 32:
        assert not tensors and not entries and not processors
        return
    assert len(processors) == len(entries) == len(attention_sites(model.denoiser))
    assert all(p.step is denoiser.step for p in processors)
    full = quantized_denoiser(model, holding({}, {}), "simulate", False)
    error = (predict(model, denoiser) - predict(model, full)).norm() / predict(model, full).norm()
    assert 0 < error < (0.01 if bits == p_bits == 8 else 0.5)
    assert error > (0 if bits == p_bits == 8 else 1e-3)


def test_modules_that_an_override_leaves_in_float_keep_their_products(model, tiny_model):
    """Activations of 32 bits; other bits of a pattern that matches are those of layers alone."""
    calibration = observed(model)
    tree = configured(tiny_model).to_dict()
    tree["quantization"]["overrides"] = {
        "mid_block.*": {"activations": {"bits": 32}},
        "up_blocks.*": {"activations": {"bits": 4}},
    }
    tensors, entries = quantize_attention(parse_config(tree, "here"), calibration)
    sites = {site.name for site in attention_sites(model.denoiser)}
    inside = {name for name in sites if name.startswith("mid_block.")}
    assert inside and set(entries) == sites - inside
    assert {entry.bits for entry in entries.values()} == {8}
    assert not any(name.startswith("mid_block.") for name in tensors)


def test_ranges_follow_the_timestep(model, tiny_model):
    tensors, entries = quantize_attention(configured(tiny_model, bits=3), observed(model))
    widened = {
        name: value[1:].expand(2).contiguous() if name.endswith("_scale") else value
        for name, value in tensors.items()
    }
    both, wide = (
        quantized_denoiser(model, holding(t, entries), "simulate", False)
        for t in (tensors, widened)
    )
    assert torch.equal(predict(model, both, 300.0), predict(model, wide, 300.0))
    assert not torch.equal(predict(model, both, 500.0), predict(model, wide, 500.0))


def test_an_attention_module_that_the_model_lacks_is_named(model, tiny_model):
    _, entries = quantize_attention(configured(tiny_model, bits=32), observed(model))
    entries["mid_block.attentions.7"] = entries[f"{BLOCK}.attn1"]
    with pytest.raises(ArtifactError, match=r"mid_block\.attentions\.7 does not fit"):
        install_attention(model.denoiser, holding({}, entries), StepState())


def test_another_processor_stays_float_and_coverage_says_why(model, tiny_model):
    model.denoiser.get_submodule(f"{BLOCK}.attn1").set_processor(OtherProcessor())
    config = configured(tiny_model, bits=6)
    tensors, entries = quantize_attention(config, observed(model))
    assert f"{BLOCK}.attn1" not in entries
    report = coverage(config, model, holding(tensors, entries))
    rows = {row["name"]: row for row in report["layers"]}
    for product in ("query_key", "probabilities_value"):
        row = rows[f"{BLOCK}.attn1.{product}"]
        assert not row["integer"]
        assert "OtherProcessor" in row["why_not_integer"]
        assert (row["weight_bits"], row["activation_bits"]) == (32, 32)
    row = rows[f"{BLOCK}.attn2.query_key"]
    assert (row["weight_bits"], row["activation_bits"], row["integer"]) == (6, 6, True)
    row = rows[f"{BLOCK}.attn2.probabilities_value"]
    assert (row["weight_bits"], row["activation_bits"], row["integer"]) == (6, 8, True)
    products = sum(r["macs"] for r in report["layers"] if r["integer"])
    assert products > 0
    assert report["integer_macs_share"] == pytest.approx(products / report["macs"])


def test_sixteen_bit_probabilities_are_not_for_8_bit_kernels(model, tiny_model):
    config = configured(tiny_model, p_bits=16)
    tensors, entries = quantize_attention(config, observed(model))
    rows = coverage(config, model, holding(tensors, entries))["layers"]
    matmuls = {row["name"]: row for row in rows if row["kind"] == "matmul"}
    assert matmuls[f"{BLOCK}.attn1.query_key"]["integer"]
    row = matmuls[f"{BLOCK}.attn1.probabilities_value"]
    assert (row["integer"], row["activation_bits"]) == (False, 16)
    assert row["why_not_integer"] == "configured"
