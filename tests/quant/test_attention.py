"""Quantized attention against diffusers' processors and against integers multiplied as integers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from qncd_cli.backends import int8
from qncd_cli.models.topology import attention_sites
from qncd_cli.quant import attention
from qncd_cli.quant.affine import choose_qparams, quantize
from qncd_cli.quant.attention import probabilities_qparams
from qncd_cli.quant.attention_processors import QuantizedAttnProcessor
from qncd_cli.quant.layers import StepState
from qncd_cli.spec import activation_spec

TOPS = {"query": 2.0, "key": 1.5, "value": 3.0}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def processor(bits=8, p_bits=8, groups=1, scale=0.5, qk_norm=True):
    """Ranges [-top / 2, top] * 2^g in timestep group g; no ranges where bits is 32."""
    tensors = {}
    for name, top in TOPS.items() if bits != 32 else ():
        tops = top * 2.0 ** torch.arange(groups)
        qparams = choose_qparams(-tops / 2, tops, activation_spec(bits))
        tensors[f"{name}_scale"], tensors[f"{name}_zero_point"] = qparams
    step = StepState()
    return QuantizedAttnProcessor(tensors, bits, p_bits, step, scale, qk_norm=qk_norm), step


def install(denoiser, bits, p_bits) -> int:
    sites = attention_sites(denoiser)
    for site in sites:
        made, _ = processor(bits, p_bits, scale=site.scale, qk_norm=site.qk_norm)
        denoiser.get_submodule(site.name).set_processor(made)
    return len(sites)


def test_samples_heads_and_queries_a_few_at_a_time_give_the_same(monkeypatch):
    made, _ = processor()
    q, k, v = (randn(2, 5, 6, 4, seed=seed) for seed in range(3))
    for mask in (None, randn(2, 5, 6, 6, seed=3), randn(2, 1, 1, 6, seed=4)):
        whole = made.products(q, k, v, mask)
        for at_once in (1, 11, 12, 36, 72, 144):
            monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
            torch.testing.assert_close(made.products(q, k, v, mask), whole, atol=1e-6, rtol=1e-6)
        monkeypatch.undo()


@pytest.mark.parametrize("mask", [None, (4, 1, 1, 300), (300, 300)])
def test_scores_held_at_once_are_bounded_whatever_the_batch(monkeypatch, mask):
    """Bit for bit, and no tensor of scores is larger than asked."""
    made, _ = processor()
    q, k, v = (randn(4, 3, 300, 16, seed=seed) for seed in range(3))
    mask = None if mask is None else randn(*mask, seed=3)
    whole, sizes, inner = made.products(q, k, v, mask), [], attention._softmax

    def seen(scores, mask):
        sizes.append(scores.numel())
        return inner(scores, mask)

    monkeypatch.setattr(attention, "_softmax", seen)
    for at_once in (1, 2, 3, 7, 0.25):
        sizes.clear()
        monkeypatch.setattr(attention, "SCORES_AT_ONCE", int(300 * 300 * at_once))
        assert torch.equal(made.products(q, k, v, mask), whole)
        assert sum(sizes) == 4 * 3 * 300 * 300
        assert max(sizes) <= 300 * 300 * at_once


# ---- against diffusers --------------------------------------------------------------------------


def class_conditional_unet():
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    context = randn(2, 3, 8, seed=1)
    return unet, lambda: unet(
        randn(2, 3, 4, 4), 7, encoder_hidden_states=context, encoder_attention_mask=mask
    )


def pixel_unet():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return unet, lambda: unet(randn(2, 3, 8, 8), 7)


def transformer():
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=5,
    )
    labels = torch.tensor([1, 4])
    return dit, lambda: dit(randn(2, 3, 4, 4), torch.tensor([7, 7]), class_labels=labels)


@pytest.mark.parametrize("plain", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("make", [class_conditional_unet, pixel_unet, transformer])
def test_without_quantization_it_is_diffusers_attention(make, plain):
    torch.manual_seed(0)
    denoiser, call = make()
    denoiser.eval()
    modules = [m for m in denoiser.modules() if isinstance(m, Attention)]
    for module in modules:
        module.set_processor(plain())
    with torch.no_grad():
        expected = call().sample
        assert install(denoiser, 32, 32) == len(modules) > 0
        assert (call().sample - expected).norm() <= 1e-6 * expected.norm()
        for module in modules:
            module.set_processor(plain())
        install(denoiser, 4, 4)
        assert (call().sample - expected).norm() > 1e-4 * expected.norm()


OPTIONS = [
    {},
    {"qk_norm": "layer_norm"},
    {"scale_qk": False},
    {"residual_connection": True, "rescale_output_factor": 1.7},
    {"norm_num_groups": 2},
    {"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
]


@pytest.mark.parametrize("plain", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
def test_options_of_the_module_mean_the_same(options, plain):
    torch.manual_seed(0)
    attn = Attention(8, heads=2, dim_head=4, processor=plain(), **options).eval()
    x, context = randn(2, 5, 8), None
    if "cross_attention_dim" in options:
        context = randn(2, 3, 6, seed=1)
    with torch.no_grad():
        expected = attn(x, context)
        site = attention_sites(torch.nn.ModuleDict({"a": attn}))[0]
        attn.set_processor(processor(32, 32, scale=site.scale, qk_norm=site.qk_norm)[0])
        assert (attn(x, context) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", ["added", "boolean"])
def test_a_mask_hides_keys_as_in_diffusers(kind):
    torch.manual_seed(0)
    attn = Attention(8, heads=2, dim_head=4).eval()
    x = randn(2, 5, 8)
    seen = torch.tensor([[True] * 5, [True, True, False, False, True]])[:, None]
    mask = seen if kind == "boolean" else (~seen).float() * -10000.0
    with torch.no_grad():
        expected = attn(x, attention_mask=mask)
        attn.set_processor(processor(32, 32, scale=attn.scale)[0])
        assert torch.allclose(attn(x, attention_mask=mask), expected, atol=1e-6)
        attn.set_processor(processor(scale=attn.scale)[0])
        hidden = attn(x, attention_mask=mask)[1, :2]
        changed = x.clone()
        changed[1, 2:4] += 1.0  # their own queries change, but nobody reads their keys and values
        assert torch.equal(attn(changed, attention_mask=mask)[1, :2], hidden)


# ---- against integers ---------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "p_bits"), [(8, 8), (8, 16), (4, 6), (6, 3)])
def test_both_products_are_what_integer_kernels_compute(bits, p_bits):
    query, key, value = (2 * randn(2, 3, 7, 4, seed=i) for i in range(3))
    made, _ = processor(bits, p_bits)
    assert (query.abs() > 2).any(), "some values must be clipped"
    spec, p_spec = activation_spec(bits), activation_spec(p_bits)
    integers, scales = {}, {}
    for name, x in (("query", query), ("key", key), ("value", value)):
        qparams = made.operand_qparams(name)
        codes = quantize(x, qparams, spec)
        assert codes.min() >= 0 and codes.max() <= 2**bits - 1
        integers[name] = codes - qparams.zero_point
        scales[name] = qparams.scale
    total = integers["query"] @ integers["key"].transpose(-1, -2)
    assert total.dtype == torch.int32
    scores = total.double() * scales["query"].double() * scales["key"].double() * made.scale
    codes = torch.round(scores.softmax(-1) * (2**p_bits - 1)).to(torch.int64)
    computed = quantize(scores.float().softmax(-1), probabilities_qparams(p_bits), p_spec)
    assert torch.equal(computed.long(), codes)
    total = codes @ integers["value"].long()
    expected = total.double() * scales["value"].double() / (2**p_bits - 1)
    found = made.products(query, key, value, None)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("bits", [2, 6, 8, 16])
def test_probabilities_take_the_whole_range_of_codes_and_no_more(bits):
    p = torch.tensor([0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-7])
    qparams, spec = probabilities_qparams(bits), activation_spec(bits)
    assert qparams.zero_point == 0
    assert qparams.scale == pytest.approx(1 / (2**bits - 1), rel=1e-6)
    codes = quantize(p, qparams, spec)
    assert codes[0] == codes[1] == 0
    assert codes[-2] == codes[-1] == 2**bits - 1
    assert math.isclose(float(codes[-1] * qparams.scale), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize(("bits", "p_bits"), [(32, 8), (8, 32)])
def test_either_half_can_stay_in_floating_point(bits, p_bits):
    query, key, value = (0.2 * randn(1, 2, 6, 4, seed=i) for i in range(3))  # nothing is clipped
    exact = processor(32, 32)[0].products(query, key, value, None)
    both = processor()[0].products(query, key, value, None)
    half = processor(bits, p_bits)[0].products(query, key, value, None)
    assert not torch.equal(half, exact) and not torch.equal(half, both)
    assert 0 < (half - exact).norm() < 0.05 * exact.norm()


def test_attention_to_a_single_key_is_the_quantized_value():
    """Of the class token: the softmax over one key is exactly 1."""
    query, key, value = randn(2, 2, 5, 4), randn(2, 2, 1, 4, seed=1), randn(2, 2, 1, 4, seed=2)
    made, _ = processor(bits=8, p_bits=2)
    spec, qparams = activation_spec(8), made.operand_qparams("value")
    expected = (quantize(value, qparams, spec) - qparams.zero_point) * qparams.scale
    assert torch.allclose(made.products(query, key, value, None), expected.expand(query.shape))


# ---- state --------------------------------------------------------------------------------------


def test_ranges_follow_the_timestep_group():
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4)
    value = torch.full((1, 1, 1, 4), 5.0)  # clipped at 3 in group 0, at 6 in group 1
    made, step = processor(groups=2)
    narrow = made.products(query, key, value, None)
    step.group = 1
    wide = made.products(query, key, value, None)
    assert narrow.max() == pytest.approx(3.0, abs=0.02)
    assert wide.max() == pytest.approx(5.0, abs=0.02)


def test_output_has_the_input_dtype_and_shape():
    attn = Attention(8, heads=2, dim_head=4, norm_num_groups=2).to(torch.bfloat16).eval()
    attn.set_processor(processor()[0])
    x = randn(2, 8, 3, 5).to(torch.bfloat16)
    found = attn(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == x.shape


def test_ranges_move_with_the_module():
    attn = Attention(8, heads=2, dim_head=4)
    attn.set_processor(processor(groups=2)[0])
    attn.to("meta")
    assert {b.device.type for b in attn.processor.buffers()} == {"meta"}
    assert len(list(attn.processor.buffers())) == 6


# ---- integer products ---------------------------------------------------------------------------


def exact_matmul(a, b):
    """What the kernel has to compute, in integers."""
    assert a.dtype == b.dtype == torch.int8
    return (a.long() @ b.long()).int()


MATMULS = [exact_matmul]
if not int8.why_unavailable(torch.device("cpu")):
    MATMULS.append(int8.matmul)


@pytest.mark.parametrize("matmul", MATMULS, ids=lambda m: m.__name__)
@pytest.mark.parametrize(("bits", "p_bits"), [(8, 8), (6, 8), (8, 6)])
@pytest.mark.parametrize("kind", ["none", "added", "boolean"])
def test_integer_products_are_what_the_simulation_says(monkeypatch, matmul, bits, p_bits, kind):
    """Ranges in which neither key nor value has its zero-point in the middle."""
    made, step = processor(bits, p_bits, groups=2)
    query, key, value = (randn(2, 3, n, 16, seed=n) * 2 for n in (7, 9, 9))
    mask = {
        "none": None,
        "added": randn(2, 1, 1, 9, seed=5),
        "boolean": torch.arange(9).expand(2, 1, 1, 9) < 6,
    }[kind]
    for group in (0, 1):
        step.group = group
        expected = made.products(query, key, value, mask)
        monkeypatch.setattr(attention, "WORTH_INTEGERS", {"macs": 0, "width": 0})
        made.matmul = matmul
        found = made.products(query, key, value, mask)
        for at_once in (1, 30, 63, 200):  # a query, three, a head, all heads of a sample
            with monkeypatch.context() as few:
                few.setattr(attention, "SCORES_AT_ONCE", at_once)
                assert torch.equal(made.products(query, key, value, mask), found)
        made.matmul = None
        assert found.shape == expected.shape
        # a probability between two codes may fall to the other one: at most one code of one value
        assert float((found - expected).norm() / expected.norm()) < 2e-3
        assert float((found - expected).abs().median()) < 1e-6


def test_small_and_wide_products_stay_in_floating_point():
    def refuse(*operands):
        raise AssertionError("an integer product")

    small, query = processor()[0], randn(1, 1, 4, 4)
    small.matmul = refuse
    small.products(query, query, query, None)
    large = randn(1, 1, 256, 256)
    for bits, p_bits in [(32, 32), (8, 16)]:
        wide = processor(bits, p_bits)[0]
        wide.matmul = refuse
        wide.products(large, large, large, None)
    small.matmul = exact_matmul
    assert torch.isfinite(small.products(large, large, large, None)).all()


@pytest.mark.skipif(len(MATMULS) < 2, reason="no int8 here")
@pytest.mark.parametrize(("rows", "columns", "width"), [(17, 11, 70), (1, 1, 1), (64, 33, 1024)])
def test_the_kernel_is_exact_at_the_ends_of_the_codes(rows, columns, width):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-128, 128, (3, n, width), generator=generator).to(torch.int8)
        for n in (rows, columns)
    )
    a[0], b[0], b[1] = -128, -128, 127
    b = b.transpose(1, 2)
    expected = exact_matmul(a, b)
    assert torch.equal(int8.matmul(a, b), expected)
    assert torch.equal(int8.matmul(a, b.contiguous()), expected)


def test_in_a_graph_a_single_key_needs_no_query():
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    made, step = processor(scale=attn.scale)
    attn.set_processor(made)
    asked = []
    attn.to_q.register_forward_hook(lambda module, args, output: asked.append(output))
    x, context = randn(3, 5, 16), randn(3, 1, 12, seed=1)
    with torch.no_grad():
        expected = attn(x, encoder_hidden_states=context)
        tables = {(made, name): made.get_buffer(name)[0] for name in made.tables}
        step.traced = tables
        found = attn(x, encoder_hidden_states=context)
    assert len(asked) == 1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert float((expected[:, 0] - expected[:, 1]).abs().max()) < 1e-6 < float(expected.std())


@pytest.mark.parametrize("p_bits", [2, 4, 8, 16, 32])
def test_with_one_key_and_integer_kernels_the_query_is_left_out(p_bits):
    """Its probability is 1 at every width, so that the bits are the same."""
    module = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4).eval()
    made, step = processor(8, p_bits, groups=2)
    x, context = randn(3, 5, 8), randn(3, 1, 6, seed=1)
    step.group = 1
    heard = []
    module.to_q.register_forward_pre_hook(lambda *call: heard.append(call))
    with torch.no_grad():
        expected = made(module, x, context)
        made.matmul = exact_matmul
        found = made(module, x, context)
        assert torch.equal(found, expected)
        assert len(heard) == 1
        made(module, x, context.expand(-1, 2, -1))
        made(module, x, context, attention_mask=torch.zeros(3, 1, 1))
    assert len(heard) == 3
