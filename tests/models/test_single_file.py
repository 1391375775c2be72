"""Single files in the names of CompVis, ComfyUI and diffusers give the folder's own model."""

from __future__ import annotations

import json

import diffusers_pipelines as tiny
import pytest
import single_files
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from oracles.comfyui_file import in_diffusers_names

from qncd_cli.errors import ModelError
from qncd_cli.models.digest import known_digest
from qncd_cli.models.loading import open_pipeline

FILES = {
    "StableDiffusionPipeline": ("sd1", ".ckpt"),
    "StableDiffusionPipeline, v": ("sd2", ".safetensors"),
    "StableDiffusionInpaintPipeline": ("sd1", ".safetensors"),
    "StableDiffusionXLPipeline": ("sdxl", ".safetensors"),
    "StableDiffusionXLImg2ImgPipeline": ("refiner", ".safetensors"),
    "StableDiffusionXLInpaintPipeline": ("sdxl", ".ckpt"),
    "StableDiffusion3Pipeline": ("sd3", ".safetensors"),
    "FluxPipeline, dev": ("flux", ".safetensors"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of a pipeline -> its folder, the same without weights, tensors of its single file."""
    found = {}

    def of(name):
        if name not in found:
            room = tmp_path_factory.mktemp("single")
            folder = tiny.save(name, room / "model")
            tensors = single_files.tensors_of(folder, FILES[name][0])
            found[name] = folder, single_files.bare(folder, room / "base"), tensors
        return found[name]

    return of


def opened(path, base, said=None):
    pipeline, _ = open_pipeline(
        str(path), None, base=str(base), tell=(said if said is not None else []).append
    )
    return pipeline


def modules_of(pipeline):
    return {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


def assert_same(pipeline, expected, **tolerance):
    ours, theirs = modules_of(pipeline), modules_of(expected)
    assert ours.keys() == theirs.keys()
    for part, module in theirs.items():
        state = ours[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(
                state[name].float(), tensor.float(), **tolerance or {"rtol": 0, "atol": 0}
            )


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_the_folder_that_it_was_written_from(made, name, tmp_path):
    folder, base, tensors = made(name)
    path = single_files.write(tensors, tmp_path / f"model{FILES[name][1]}")
    pipeline, expected = opened(path, base), DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is type(expected)
    assert_same(pipeline, expected)


@pytest.mark.parametrize("name", FILES)
def test_diffusers_own_converters_read_the_same_from_it(made, name):
    """So the files of these tests have the names that published ones have."""
    folder, _, tensors = made(name)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    denoiser = pipeline.components.get("transformer") or pipeline.unet
    below = len(single_files.UNET)
    found = {n[below:]: t for n, t in tensors.items() if n.startswith(single_files.UNET)}
    converted = in_diffusers_names(found, denoiser)
    assert converted.keys() == denoiser.state_dict().keys()
    assert all(torch.equal(converted[n], t) for n, t in denoiser.state_dict().items())
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(pipeline.vae.config))
    assert all(torch.equal(vae[n], t) for n, t in pipeline.vae.state_dict().items())
    for part in ("text_encoder", "text_encoder_2"):
        encoder = pipeline.components.get(part)
        if encoder is None or "CLIP" not in type(encoder).__name__:
            continue
        if part == "text_encoder_2" and FILES[name][0] == "sd3":
            continue  # diffusers tells it from the first by its width alone
        read = single_file_utils.create_diffusers_clip_model_from_ldm(
            type(encoder), dict(tensors), part, str(folder), local_files_only=True
        )
        left = {} if FILES[name][0] != "sd3" else {"text_projection.weight"}
        for key, tensor in encoder.state_dict().items():
            assert key in left or torch.equal(read.state_dict()[key], tensor), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_as_it_is_stored(made, dtype, tmp_path):
    folder, base, tensors = made("StableDiffusionXLPipeline")
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    pipeline = opened(single_files.write(half, tmp_path / "m.safetensors"), base)
    assert {m.dtype for m in modules_of(pipeline).values()} == {dtype}
    assert_same(pipeline, DiffusionPipeline.from_pretrained(folder).to(dtype))


@pytest.mark.parametrize("names", ["authors", "prefixed", "diffusers"])
def test_a_denoiser_alone_takes_the_rest_from_its_base(made, names, tmp_path):
    folder, _, tensors = made("FluxPipeline, dev")
    expected = DiffusionPipeline.from_pretrained(folder)
    if names == "diffusers":
        alone = {n: t.contiguous() for n, t in expected.transformer.state_dict().items()}
    else:
        start = len(single_files.UNET) if names == "authors" else 0
        alone = {n[start:]: t for n, t in tensors.items() if n.startswith(single_files.UNET)}
    alone = {name: tensor + 1 for name, tensor in alone.items()}
    path = single_files.write(alone, tmp_path / "flux.safetensors")
    pipeline = opened(path, folder)
    for part, module in modules_of(expected).items():
        added = 1 if part == "transformer" else 0
        ours = modules_of(pipeline)[part].state_dict()
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(ours[name], tensor + added, rtol=0, atol=0)


def test_shards_are_one_file(made, tmp_path):
    folder, base, tensors = made("StableDiffusionPipeline")
    names = sorted(tensors)
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        single_files.write(part, tmp_path / f"m-0000{number}-of-00002.safetensors")
    source = tmp_path / "m-00001-of-00002.safetensors"
    assert_same(opened(source, base), DiffusionPipeline.from_pretrained(folder))
    digest = known_digest(str(source), base=str(base))
    second = tmp_path / "m-00002-of-00002.safetensors"
    part = {name: tensors[name] + 1 for name in names[1::2]}
    single_files.write(part, second)
    assert known_digest(str(source), base=str(base)) != digest
    second.unlink()
    with pytest.raises(ModelError, match="00002-of-00002.*no such file.*all of its shards"):
        opened(source, base)


def test_moving_averages_are_taken_where_there_are_any(made, tmp_path):
    folder, base, tensors = made("StableDiffusionPipeline")
    own = {n: t for n, t in tensors.items() if n.startswith(single_files.UNET)}
    averaged = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": t for n, t in own.items()}
    plain = {name: tensor + 1 for name, tensor in own.items()}
    path = single_files.write({**tensors, **plain, **averaged}, tmp_path / "m.ckpt")
    assert_same(opened(path, base), DiffusionPipeline.from_pretrained(folder))


def test_what_a_file_lacks_and_has_too_much_is_said(made, tmp_path):
    folder, base, tensors = made("StableDiffusionXLPipeline")

    def refused(changed, of=base):
        with pytest.raises(ModelError) as error:
            opened(single_files.write(changed, tmp_path / "m.safetensors"), of)
        assert "\n" not in str(error.value)
        return f"{error.value.message} {error.value.hint}"

    def without(start):
        return {n: t for n, t in tensors.items() if not n.startswith(start)}

    text = "conditioner.embedders.1."
    assert "has no text_encoder_2, and neither has" in refused(without(text))
    assert "has no vae, and neither has" in refused(without("first_stage_model."))
    assert "holds no denoiser" in refused(without(single_files.UNET))
    key = f"{single_files.UNET}out.2.weight"
    said = refused({n: t for n, t in tensors.items() if n != key})
    assert f"1 tensor missing ({key})" in said
    assert "of the same kind" in said
    assert "expected [4, 8, 3, 3]" in refused({**tensors, key: tensors[key][:, :4].clone()})
    assert "not in" in refused({**tensors, f"{single_files.UNET}extra.weight": tensors[key]})
    encoder = f"{text}model.transformer.resblocks.1.ln_1.weight"
    assert "text_encoder_2: 1 tensor missing" in refused(without(encoder))
    assert "model.base no/folder: neither a pipeline folder" in refused(tensors, "no/folder")
    other = made("StableDiffusionPipeline")[1]
    assert "of the same kind" in refused(tensors, other)
    said = []
    aside = {**tensors, "denoiser.sigmas": torch.ones(3), "odd": torch.ones(2)}
    pipeline = opened(single_files.write(aside, tmp_path / "m.safetensors"), base, said)
    assert [line for line in said if "1 tensor of no part" in line and "(odd)" in line]
    assert_same(pipeline, DiffusionPipeline.from_pretrained(folder))


def test_scaled_fp8_is_read_with_its_scales_and_refused_without(made, tmp_path):
    folder, base, tensors = made("FluxPipeline, dev")
    scaled, start = dict(tensors), single_files.UNET
    layers = [n for n in tensors if n.startswith(start) and tensors[n].ndim == 2]
    for name in layers:
        scale = tensors[name].abs().max() / 448
        scaled[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        scaled[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
    scaled[f"{start}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    path = single_files.write(scaled, tmp_path / "m.safetensors")
    expected = DiffusionPipeline.from_pretrained(folder)
    assert_same(opened(path, base), expected, rtol=2**-4, atol=2e-3)
    del scaled[layers[3].replace(".weight", ".scale_weight")]
    with pytest.raises(ModelError, match="is scaled fp8, 1 tensor without a scale"):
        opened(single_files.write(scaled, path), base)


def test_stable_diffusion_3_works_without_its_third_encoder(made, tmp_path):
    _, base, tensors = made("StableDiffusion3Pipeline")
    short = {n: t for n, t in tensors.items() if ".t5xxl." not in n}
    said = []
    pipeline = opened(single_files.write(short, tmp_path / "m.safetensors"), base, said)
    assert pipeline.text_encoder_3 is None
    assert "has no text_encoder_3" in said[0]


def test_a_base_is_for_files_and_files_need_one(made, tmp_path):
    folder, base, tensors = made("StableDiffusionPipeline")
    with pytest.raises(ModelError, match="is no single file.*leave model.base out"):
        open_pipeline(str(folder), None, base=str(base))
    path = single_files.write(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="needs a pipeline folder of the same kind.*model.base"):
        open_pipeline(str(path), None)
    index = json.loads((base / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
