"""Whatever would exchange the quantized attention of an exported pipeline is refused."""

from __future__ import annotations

import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import qncd_cli.exported  # noqa: F401  diffusers loads what it exported
from qncd_cli.errors import ModelError
from qncd_cli.quant.attention import AttentionProducts

REFUSED = "the products of attention are quantized"


def exported(folder, name, **sampling):
    work = Qncd(folder)
    few = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    source = tiny.save(name, folder / "model")
    tree = tiny_config(source, calibration=few, correction__inter__method="none")
    tree["sampling"] |= {"steps": 2, "prompts": ["a red shoe"], "image_size": 16, **sampling}
    work.write_config(tree)
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("export", "--to", "diffusers", "out")
    return folder / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("export"), "StableDiffusionPipeline")


@pytest.fixture
def pipeline(folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn(pipeline):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    return torch.from_numpy(pipeline("a red shoe", generator=generator, **options).images)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.enable_attention_slicing(),
        lambda p: p.unet.set_attention_slice("max"),
        lambda p: p.unet.set_attn_processor(AttnProcessor2_0()),
        lambda p: p.unet.set_default_attn_processor(),
        lambda p: p.fuse_qkv_projections(),
    ],
    ids=["slicing", "slice", "processor", "default", "fused"],
)
def test_other_attention_is_refused_and_changes_nothing(pipeline, change):
    expected = drawn(pipeline)
    with pytest.raises((ModelError, ValueError), match=f"{REFUSED}|QuantizedAttnProcessor"):
        change(pipeline)  # the ValueError is diffusers' own, of set_default_attn_processor
    pipeline.unet.set_attn_processor(pipeline.unet.attn_processors)  # its own may be set again
    assert torch.equal(drawn(pipeline), expected)


def test_a_processor_put_in_behind_our_back_is_seen_at_the_next_call(pipeline):
    module = next(m for m in pipeline.unet.modules() if hasattr(m, "set_processor"))
    assert isinstance(module.processor, AttentionProducts)
    del module.processor
    module.processor = AttnProcessor2_0()
    with pytest.raises(ModelError, match=REFUSED):
        drawn(pipeline)


@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_joint_attention_by_another_backend_is_refused(tmp_path):
    folder = exported(tmp_path, "FluxPipeline, schnell", guidance_scale=1.0)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = drawn(pipeline)
    with pytest.raises(ModelError, match=REFUSED):
        pipeline.transformer.fuse_qkv_projections()
    inner = [m.inner for m in pipeline.transformer.modules() if hasattr(m, "inner")]
    assert inner
    for processor in inner:
        processor._attention_backend = "flex"
    with pytest.raises(ModelError, match='take the attention backend "native"'):
        drawn(pipeline)
    for processor in inner:
        processor._attention_backend = None
    assert torch.equal(drawn(pipeline), expected)
