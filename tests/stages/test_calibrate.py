"""Calibration at several sizes: what observers see of each, and which rows are kept."""

from __future__ import annotations

import diffusers_pipelines
import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.loading import parse_config
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.spec import ATTENTION_OPERANDS
from qncd_cli.stages import calibrate

TEXTS = ("a red shoe", "a blue bag")
OWN, OTHER = (16, 16), (16, 28)
"""16 x 28 is 768 x 1344, smaller."""
SEED = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    name = "StableDiffusionXLPipeline"
    return diffusers_pipelines.save(name, tmp_path_factory.mktemp("pipeline") / "model")


def calibrated(folder, size, *, seed=SEED, trajectories=2, sizes=None):
    """The calibration artifact of SDXL at a size, batches of two trajectories each."""
    tree = tiny_config(folder, correction__intra="none", correction__inter__method="none")
    tree["quantization"]["split_skip_connections"] = False  # a factor that depends on the seeds
    tree["sampling"] |= {"prompts": list(TEXTS), "height": size[0], "width": size[1]}
    own = {"seed": seed, "trajectories": trajectories, "batch_size": 2, "noise_trajectories": 1}
    tree["calibration"] = {**own, "sizes": sizes}
    config = parse_config(tree, "test")
    prompts = Prompts(TEXTS, image_size=config.sampling.sides, guidance_scale=2.0)
    model = load_model(str(folder), prompts=prompts, sizes=config.calibration.sizes or ())
    made = calibrate.run(config, model)
    assert made is not None
    return made[0]


def test_ranges_of_two_sizes_cover_both_and_rows_are_of_samplings_own(folder):
    both = calibrated(folder, OWN, trajectories=4, sizes=[list(OTHER)])
    first, second = calibrated(folder, OWN), calibrated(folder, OTHER, seed=SEED + 2)
    observed = [f"{name}.input" for name in both.body["layers"]]
    observed += [f"{n}.{o}" for n in both.body["attention"] for o in ATTENTION_OPERANDS]
    assert len(observed) > 30
    ends = {"min": torch.minimum, "max": torch.maximum, "channel_absmax": torch.maximum}
    wider = [0, 0]
    for name in observed:
        for end, of_both in ends.items():
            one, other = (found.tensors[f"{name}_{end}"] for found in (first, second))
            assert torch.equal(both.tensors[f"{name}_{end}"], of_both(one, other)), name
            wider[0] += bool((of_both(one, other) != other).any())
            wider[1] += bool((of_both(one, other) != one).any())
        counts = [f.tensors[f"{name}_histogram"].sum() for f in (both, first, second)]
        assert counts[0] == counts[1] + counts[2]
    assert min(wider) > 10  # each size has ranges that the other has not
    assert both.body["latent_shape"] == first.body["latent_shape"] == [4, 8, 8]
    for part in ("x", "prediction", "timestep", "class", "seed"):
        assert torch.equal(both.tensors[f"inputs.{part}"], first.tensors[f"inputs.{part}"])


def test_each_size_is_told_to_a_denoiser_that_reads_it(folder):
    model = load_model(str(folder), prompts=Prompts(TEXTS, image_size=OWN), sizes=[OTHER])
    labels = torch.tensor([1, 0])
    for of_size, (height, width) in ((model, OWN), (model.sized[OTHER], OTHER)):
        ids = [height, width, 0, 0, height, width]
        assert of_size.condition(labels)["time_ids"].tolist() == [ids, ids]
        assert of_size.null_condition(1)["time_ids"].tolist() == [ids]
    texts = [of.condition(labels)["text_embeds"] for of in (model, model.sized[OTHER])]
    assert torch.equal(*texts)
