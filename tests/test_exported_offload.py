"""Exported pipelines moved, offloaded, cast, compiled, saved: the same images, or a reason.

On the CPU alone: accelerate's and diffusers' hooks move tensors from the CPU to the CPU, to a disk
and to the meta device, where a tensor that a hook has missed fails.
"""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from test_exported_attention import drawn, exported

import qncd_cli.exported  # noqa: F401  diffusers loads what it exported
from qncd_cli.backends.reference import simulate
from qncd_cli.errors import BackendUnavailable, ModelError
from qncd_cli.quant.layers import CachedTimestepLayer, QuantizedLayer

CPU = torch.device("cpu")
ROUNDING = 0.02
"""Mean difference of pixels in [0, 1] that float rounding makes in a tiny random model, whose codes
it moves."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("export"), "StableDiffusionPipeline")


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return exported(folder, "FluxPipeline, schnell", guidance_scale=1.0)


def opened(folder, **options):
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(folder):
    return opened(folder)


@pytest.fixture(scope="module")
def expected(folder):
    return drawn(opened(folder))


def denoiser(pipeline):
    return pipeline.components.get("transformer") or pipeline.unet


def grouped(kind, **options):
    def offload(pipeline, tmp_path):
        denoiser(pipeline).enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type=kind, **options
        )

    return offload


def hooked(**options):
    return lambda p, _: accelerate.cpu_offload(denoiser(p), CPU, **options) and None


OFFLOADS = {
    "enable_model_cpu_offload": lambda p, _: p.enable_model_cpu_offload(device="cpu"),
    "hooks as of enable_sequential_cpu_offload": hooked(offload_buffers=False),
    "every tensor away": hooked(offload_buffers=True),
    "groups of leaves": grouped("leaf_level"),
    "groups of blocks": grouped("block_level", num_blocks_per_group=1),
}


@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_pipeline_draws_the_same_images(pipeline, expected, tmp_path, how):
    OFFLOADS[how](pipeline, tmp_path)
    assert torch.equal(drawn(pipeline), expected)
    assert torch.equal(drawn(pipeline), expected)


@pytest.mark.parametrize("how", ["every tensor away", "groups of leaves"])
def test_joint_attention_is_offloaded_as_well(joint, tmp_path, how):
    expected = drawn(opened(joint))
    pipeline = opened(joint)
    OFFLOADS[how](pipeline, tmp_path)
    assert torch.equal(drawn(pipeline), expected)


@pytest.mark.parametrize("how", ["accelerate", "diffusers"])
def test_a_disk_that_tensors_come_from_changes_float_rounding_alone(
    pipeline, expected, tmp_path, how
):
    """Memory that is mapped lies at other addresses, for which kernels sum in another order."""
    if how == "accelerate":
        accelerate.disk_offload(pipeline.unet, str(tmp_path), CPU, offload_buffers=True)
    else:
        grouped("leaf_level", offload_to_disk_path=str(tmp_path))(pipeline, tmp_path)
    assert (drawn(pipeline) - expected).abs().mean() < ROUNDING


def test_tensors_that_are_away_are_not_saved(pipeline, expected, tmp_path):
    accelerate.cpu_offload(pipeline.unet, CPU, offload_buffers=True)
    with pytest.raises(ModelError, match="are offloaded.*before it is offloaded"):
        pipeline.unet.save_pretrained(tmp_path / "away")
    accelerate.hooks.remove_hook_from_submodules(pipeline.unet)
    assert not list((tmp_path / "away").glob("*.safetensors"))


def test_saved_and_loaded_again_it_draws_the_same_images(pipeline, expected, tmp_path):
    pipeline.enable_model_cpu_offload(device="cpu")
    drawn(pipeline)
    pipeline.save_pretrained(tmp_path / "again")
    assert torch.equal(drawn(opened(tmp_path / "again")), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_is_refused_and_loading_in_a_type_works(folder, pipeline, expected, dtype):
    for cast in (lambda: pipeline.to(dtype), lambda: pipeline.unet.to(dtype)):
        with pytest.raises(ValueError, match="Casting a quantized model.*is unsupported"):
            cast()
    with pytest.raises(ValueError, match="not supported for quantized model"):
        pipeline.unet.half()
    half = opened(folder, dtype=dtype)
    codes = [m.weight.dtype for m in half.unet.modules() if isinstance(m, QuantizedLayer)]
    assert codes and not {torch.bfloat16, torch.float16} & set(codes)
    assert half.unet.conv_norm_out.weight.dtype == dtype
    assert (drawn(half).float() - expected).abs().mean() < ROUNDING


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_compiling_leaves_the_denoiser_as_it_is(pipeline, expected, how):
    if how == "compile":
        pipeline.unet.compile()
    else:
        pipeline.unet = torch.compile(pipeline.unet)
    assert torch.equal(drawn(pipeline), expected)


def test_compiling_its_blocks_is_refused(pipeline, expected):
    with pytest.raises(ModelError, match="qncd sample --compile"):
        pipeline.unet.compile_repeated_blocks()
    assert torch.equal(drawn(pipeline), expected)


def test_a_copy_computes_with_its_own_layers(pipeline, expected):
    pipeline.unet = copy.deepcopy(pipeline.unet)
    assert pipeline.unet.forward.__self__ is pipeline.unet
    assert torch.equal(drawn(pipeline), expected)


def test_the_backend_follows_the_device(pipeline, expected):
    """A GPU has no integer kernels here; what was prepared for the CPU goes with the move."""
    unet = pipeline.unet
    quantizer = unet.hf_quantizer
    layers = [m for m in unet.modules() if isinstance(m, QuantizedLayer)]
    before = layers[0].compute
    quantizer.compute_on(unet, torch.device("cuda"))
    assert all(layer.compute is simulate for layer in layers)
    quantizer.compute_on(unet, CPU)
    assert all(layer.compute is before for layer in layers)
    assert torch.equal(drawn(pipeline), expected)
    rows = next(m for m in unet.modules() if isinstance(m, CachedTimestepLayer))._rows
    assert any(layer.prepared for layer in layers) and rows
    layers[0].to("meta")
    assert not layers[0].prepared
    if before is not simulate:
        quantizer.quantization_config.backend = "int8"
        with pytest.raises(BackendUnavailable, match="int8"):
            quantizer.compute_on(unet, torch.device("cuda"))
