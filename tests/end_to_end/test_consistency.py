"""Consistency models and guided-diffusion's files: own samples, four stages, convert."""

from __future__ import annotations

import json

import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import ConsistencyModelPipeline, DiffusionPipeline
from oracles.compvis_reference import UNetModel

from qncd_cli.models.loading import load_model
from qncd_cli.runtime.denoiser import full_denoiser, guided_predict
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler

SEEDS = [4, 5, 6]
PARAMS = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 32,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}


def drawn(model, steps):
    labels = model.labels(SEEDS, "all")
    scheduler = make_scheduler("consistency", model.scheduler_config)
    predict = guided_predict(model, full_denoiser(model), labels, 1.0)
    with torch.no_grad():
        return denoise(predict, scheduler, steps, generators_for(SEEDS), model.latent_shape)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_own_samples_are_those_of_the_pipeline(steps, classes, tmp_path):
    folder = tiny.save("ConsistencyModelPipeline", tmp_path / "model")
    if classes is not None:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        unet = type(pipeline.unet)(**{**pipeline.unet.config, "num_class_embeds": classes})
        ConsistencyModelPipeline(unet, pipeline.scheduler).save_pretrained(folder)
    model = load_model(str(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        len(SEEDS),
        class_labels=None if classes is None else [seed % classes for seed in SEEDS],
        num_inference_steps=steps,
        generator=generators_for(SEEDS),
        output_type="pt",
    ).images
    found = (drawn(model, steps) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def four_stages(work, source, **changes):
    """Share of the MACs in integers."""
    tree = tiny_config(source, sampling__steps=2, sampling__guidance_scale=1.0, **changes)
    tree["calibration"] = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    tree["correction"]["inter"]["method"] = "none"
    work.write_config(tree)
    plan = work("run", "--config", "tiny.yaml", "--plan", "--json").data
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "2")
    work("eval")
    found = json.loads((work.folder / "runs/tiny/coverage.json").read_text())
    assert plan["coverage"]["integer_macs_share"] == pytest.approx(found["integer_macs_share"])
    return found["integer_macs_share"]


def test_four_stages_of_a_consistency_model(tmp_path):
    folder = tiny.save("ConsistencyModelPipeline", tmp_path / "model")
    assert four_stages(Qncd(tmp_path), folder) > 0.9


@pytest.mark.parametrize("kind", ["noise", "consistency"])
def test_guided_diffusions_files_become_folders_that_run(kind, tmp_path):
    """The folder computes what the file's own program does; learnt variances are left out."""
    torch.manual_seed(0)
    channels = 6 if kind == "noise" else 3
    theirs = UNetModel({**PARAMS, "out_channels": channels}).eval()
    for parameter in theirs.parameters():  # begins with zeros there
        torch.nn.init.normal_(parameter, std=0.05)
    state = theirs.state_dict()
    if kind == "consistency":  # all queries, keys and values lie together there
        state = {n: _apart(t) if ".qkv." in n else t for n, t in state.items()}
    torch.save(state, tmp_path / "weights.pt")
    work = Qncd(tmp_path)
    options = ("--adm", kind, "--image-size", "16", "--head-channels", "32")
    work("convert", "weights.pt", *options, "--out", "model")
    ours = load_model(str(tmp_path / "model")).denoiser
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7.0, 30.5])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t).sample, theirs(x, t)[:, :3], rtol=1e-4, atol=1e-5)
    assert four_stages(work, tmp_path / "model") > 0.9


def _apart(tensor):
    heads = tensor.reshape(-1, 3, 32, *tensor.shape[1:])
    return heads.transpose(0, 1).reshape(tensor.shape)


def test_what_convert_cannot_read_is_one_line(tmp_path):
    state = UNetModel(PARAMS).state_dict()
    torch.save({**state, "label_emb.weight": torch.zeros(5, 128)}, tmp_path / "classes.pt")
    torch.save({"model": torch.zeros(2)}, tmp_path / "other.pt")
    work = Qncd(tmp_path)
    for file, options, code, said in (
        ("classes.pt", ("noise", "--image-size", "16", "--head-channels", "32"), 5, "null class"),
        ("other.pt", ("noise", "--image-size", "16"), 5, "is no U-Net of ADM"),
        ("classes.pt", ("noise",), 2, "--adm needs --image-size"),
    ):
        refused = work("convert", file, "--out", "model", "--adm", *options, ok=False)
        assert refused.exit_code == code and said in refused.stderr, refused.stderr
        assert not (tmp_path / "model").exists()
