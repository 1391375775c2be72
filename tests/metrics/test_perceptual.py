"""LPIPS with weights of the right shape: torch-fidelity's number, and a line where they are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch_fidelity import sample_similarity_lpips
from torchvision.models.vgg import cfgs, make_layers

from qncd_cli.errors import ArtifactError, BackendUnavailable
from qncd_cli.metrics import perceptual

from .shared import random_images, save_lpips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both files with random weights of which no layer blows up or dies out."""
    return save_lpips(tmp_path_factory.mktemp("lpips"))


def test_equal_images_are_0_and_the_number_is_torch_fidelitys_own(folder, monkeypatch):
    vgg, linear = (
        torch.load(folder / name, weights_only=True)
        for name in (perceptual.VGG_FILE, perceptual.LINEAR_FILE)
    )
    layers = make_layers(cfgs["D"])
    layers.load_state_dict({k.removeprefix("features."): vgg[k] for k in vgg if "features" in k})
    monkeypatch.setattr(
        sample_similarity_lpips, "load_state_dict_from_url", lambda *_, **__: linear
    )
    monkeypatch.setattr(
        sample_similarity_lpips,
        "torchvision_load_pretrained_vgg16",
        lambda: SimpleNamespace(features=layers),
    )
    theirs = sample_similarity_lpips.SampleSimilarityLPIPS("lpips-vgg16")
    images = random_images(0, 10, size=32) // 2
    other = (
        images
        + random_images(1, 10, size=32) // torch.tensor([4, 16]).repeat(5)[:, None, None, None]
    )
    weights = perceptual.find_weights(folder)
    found = perceptual.lpips_each(images, other, weights)
    expected = theirs(images, other).flatten().tolist()
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(found[::2]) > max(found[1::2]) > 0
    assert perceptual.lpips_each(images[:2, :1], images[:2, :1], weights) == [0.0, 0.0]


def test_missing_weights_are_one_line_that_names_files_and_option(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BackendUnavailable, match="vgg16-397923af.pth, weights-vgg16-lpips.pth mis"):
        perceptual.find_weights()
    (tmp_path / perceptual.LINEAR_FILE).touch()
    with pytest.raises(BackendUnavailable, match="vgg16-397923af.pth missing") as caught:
        perceptual.find_weights(tmp_path)
    assert "--lpips-weights DIR" in caught.value.hint
    (tmp_path / "checkpoints").symlink_to(folder)
    assert perceptual.find_weights() != perceptual.find_weights(folder)
    assert perceptual.find_weights().sha256 == perceptual.find_weights(folder).sha256


def test_other_weights_and_files_that_hold_more_than_tensors_are_refused(folder, tmp_path):
    images = random_images(0, 1)
    for name in (perceptual.VGG_FILE, perceptual.LINEAR_FILE):
        (tmp_path / name).symlink_to(folder / name)
    linear = tmp_path / perceptual.LINEAR_FILE
    for wrong, said in (
        ({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, "not the weights of LPIPS"),
        ({"a": print}, "it holds more than tensors"),
        ([torch.zeros(1)], "not a PyTorch state dict"),
    ):
        linear.unlink()
        torch.save(wrong, linear)
        with pytest.raises(ArtifactError, match=said):
            perceptual.lpips_each(images, images, perceptual.find_weights(tmp_path))
    small = random_images(0, 1, size=8)
    with pytest.raises(ArtifactError, match="LPIPS needs images of 16 pixels a side"):
        perceptual.lpips_each(small, small, perceptual.find_weights(folder))
