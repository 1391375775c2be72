from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qncd_cli.errors import ModelError
from qncd_cli.metrics.domains import DOMAINS, domain_of
from qncd_cli.models.loading import load_model
from qncd_cli.models.zoo import ZOO, training_record, zoo_models, zoo_path


def bytes_below(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_packaged_models_are_small_and_in_half_precision():
    """All of one domain together, the classifiers and references of both beside them."""
    sizes = dict.fromkeys(DOMAINS, 0)
    for name, folder in zoo_models().items():
        sizes[domain_of(f"zoo:{name}").name] += bytes_below(folder)
    assert sizes["fashion"] <= 40e6 and sizes["emoji"] <= 30e6
    assert bytes_below(ZOO) == sum(sizes.values()) + bytes_below(ZOO / "features")
    assert bytes_below(ZOO / "features") <= 4e6
    for name, folder in zoo_models().items():
        for path in folder.rglob("*.safetensors"):
            dtypes = {t.dtype for t in load_file(path).values()}
            assert dtypes == {torch.float16}, (name, path)


def test_the_record_says_what_the_issue_asked_for():
    record = training_record("fashion-ldm")
    assert record["vqvae"]["test_psnr_db"] >= 25
    guided = record["samples"]["quality"]["guidance_3"]
    assert guided["class_agreement"] >= 0.9
    assert {"data", "steps", "loss", "seed"} <= set(record["unet"])


def test_fashion_ldm_has_the_shape_of_ldm_4():
    model = load_model("zoo:fashion-ldm")
    assert model.latent_shape == (3, 8, 8)
    assert model.num_classes == 10
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    assert 9e6 < parameters < 13e6
    assert model.denoiser.config.cross_attention_dim == 128
    assert model.decode(torch.zeros(1, 3, 8, 8)).shape == (1, 1, 32, 32)


def test_emoji_ldm_is_in_colour_with_latents_of_16x16():
    model = load_model("zoo:emoji-ldm")
    assert model.latent_shape == (4, 16, 16)
    assert model.num_classes == 12
    record = training_record("emoji-ldm")
    assert record["samples"]["quality"]["guidance_3"]["class_agreement"] >= 0.8
    assert {"data", "steps", "loss", "seed"} <= set(record["unet"]) & set(record["vqvae"])


@pytest.mark.parametrize("name", zoo_models())
def test_every_packaged_model_predicts_and_draws(name):
    """However many there are."""
    model = load_model(f"zoo:{name}")
    condition = model.condition(model.labels([0], "all"))
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noise = model.denoiser(x, torch.tensor([500]), **condition).sample
    assert noise.shape == x.shape
    assert torch.isfinite(noise).all()
    domain = domain_of(f"zoo:{name}")
    assert domain is not None and model.num_classes == domain.classes
    assert model.decode(x).shape == (1, domain.channels, domain.side, domain.side)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ModelError, match="did you mean zoo:fashion-ldm"):
        zoo_path("fashion-lmd")


def test_packaged_files_name_no_folder_of_the_machine_that_made_them():
    for path in ZOO.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path
