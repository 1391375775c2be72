"""Weights of feature networks: missing, damaged, of another network, and their names."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch

from qncd_cli.errors import ArtifactError, BackendUnavailable
from qncd_cli.metrics import image, networks
from qncd_cli.metrics.domains import EMOJI
from qncd_cli.metrics.features import FashionClassifier, SmallClassifier
from qncd_cli.metrics.fidelity import Features, create_extractor, extract_features
from qncd_cli.metrics.protocol import Protocol, prepared
from qncd_cli.metrics.reference import Reference

from .shared import gaussian, random_images


def identity(size: int) -> dict[str, np.ndarray]:
    return {"mu": np.zeros(size), "sigma": np.eye(size)}


def test_missing_and_damaged_classifier(tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.safetensors: No such file.*reinstall"):
        networks.packaged(tmp_path / "none.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path in (bad, tmp_path / "other.safetensors"):
        with pytest.raises(ArtifactError, match="not the weights of fashion-classifier"):
            extract_features(random_images(0, 2), networks.packaged(path))
    torch.manual_seed(0)
    state = FashionClassifier().state_dict()
    state["head.weight"][0, 0] = math.nan
    safetensors.torch.save_file(state, bad)
    with pytest.raises(ArtifactError, match="not finite"):
        extract_features(random_images(0, 2), networks.packaged(bad))


def test_the_classifier_of_emoji_sees_colour_and_twelve_classes(tmp_path, network) -> None:
    torch.manual_seed(0)
    path = tmp_path / "emoji.safetensors"
    made = SmallClassifier(3, 12, stride=2).half()
    safetensors.torch.save_file(made.state_dict(), path)
    emoji = networks.packaged(path, EMOJI)
    assert (emoji.name, emoji.distance_name) == ("emoji-classifier", "fd_emoji")
    assert emoji.resize == "64x64 bilinear with antialiasing, 0 to 1"
    images = torch.nn.functional.interpolate(random_images(0, 3), (64, 64))
    found = extract_features(images, emoji)
    with torch.no_grad():
        features, logits = made.float().eval()(images / 255)
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.logits, logits)
    assert logits.shape == (3, 12)
    mirrored = images.flip(1)  # red and blue exchanged: a grey image stays as it is
    assert not torch.equal(extract_features(mirrored, emoji).features, found.features)
    assert image.fits_labels([0, 11], emoji) and not image.fits_labels([0, 11], network)
    with pytest.raises(ArtifactError, match="not the weights of fashion-classifier"):
        extract_features(images, networks.packaged(path))


def test_inception_download_fails_in_one_line(monkeypatch, tmp_path) -> None:
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        BackendUnavailable, match=r"cannot be downloaded.*--inception-weights FILE"
    ) as caught:
        networks.inception()
    assert "\n" not in str(caught.value)


def test_inception_file_is_checked_and_never_executed(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        networks.inception(tmp_path / "none.pth")
    path = tmp_path / "bad.pth"
    path.write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match=r"bad\.pth"):
        networks.inception(path)
    torch.save({"call": print}, path)
    with pytest.raises(ArtifactError, match="refused"):
        networks.inception(path)
    torch.save({"fc.weight": torch.zeros(10, 2048)}, path)
    with pytest.raises(ArtifactError, match=r"fc\.weight \[1008, 2048\]"):
        networks.inception(path)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(ArtifactError, match="not the weights of inception"):
        extract_features(random_images(0, 2), networks.inception(path))


def test_only_the_published_inception_weights_make_a_fid(monkeypatch, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    # matrices of 2,048 features take a minute of CPU here: 16 do for names
    stand_in = replace(networks.inception(path), feature_size=16, spatial_size=7)
    known = Reference("r", statistics=identity(16), spatial=identity(7))
    rows, logits, spatial = gaussian(0, 4, 16), gaussian(1, 4, 1008), gaussian(2, 4, 7)
    wanted = {"fid", "sfid", "isc"}

    assert stand_in.name == f"inception-v3-compat@{stand_in.sha256[:8]}"
    assert not stand_in.is_fid
    features = Features(stand_in.name, rows, logits, spatial)
    found = image.measure(features, known, stand_in, wanted).entry
    assert found["fid"] is found["sfid"] is found["inception_score"] is None
    assert found["feature_distance"]["name"] == f"fd_{stand_in.name}"
    assert found["spatial_distance"]["name"] == f"sfd_{stand_in.name}"

    monkeypatch.setattr(networks, "INCEPTION_SHA256", stand_in.sha256)
    real = replace(networks.inception(path), feature_size=16, spatial_size=7)
    features = Features(real.name, rows, logits, spatial)
    found = image.measure(features, known, real, wanted).entry
    assert real.is_fid
    assert found["fid"] == found["feature_distance"]["value"] > 0
    assert found["sfid"] == found["spatial_distance"]["value"] > 0
    assert found["spatial_distance"]["name"] == "sfid"
    assert found["inception_score"] == found["class_score"]["value"] > 0


# ---- Inception with random weights --------------------------------------------------------------


@pytest.mark.slow
def test_spatial_features_are_7_channels_of_the_17x17_layer_laid_out_as_in_tensorflow(
    inception,
) -> None:
    images = random_images(0, 2)
    found = extract_features(images, inception, spatial=True)
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008)
    assert found.spatial is not None and found.spatial.shape == (2, 2023)
    extractor = create_extractor(inception)
    with torch.no_grad():
        seen = {}
        blocks = [name for name, _ in extractor.named_children() if name.startswith("Mixed_6")]
        for name in blocks:
            extractor.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: output})
            )
        extractor(images)
    own = seen["Mixed_6d"][:, :7]  # a block joins its branches, the 1x1 convolution's first
    expected = own.permute(0, 2, 3, 1).reshape(2, -1)
    torch.testing.assert_close(found.spatial, expected, rtol=1e-4, atol=1e-5)
    assert extract_features(images, inception).spatial is None


def test_networks_without_such_a_layer_have_no_sfid(network) -> None:
    protocol = prepared(Protocol(("fid", "sfid"), network, Reference("r", random_images(1))), 12)
    assert protocol.metrics == ("fid",)
    assert "no spatial features" in protocol.left_out["sfid"][0]


# ---- EfficientNet -------------------------------------------------------------------------------


def test_efficientnet_is_measured_in_under_its_own_name() -> None:
    network = networks.efficientnet()
    reference = image.load_reference(random_images(1, 6))
    found = image.measure(random_images(0, 6), reference, network, {"fid", "isc"}, rounds=2).entry
    assert found["fid"] is found["inception_score"] is None
    distance = found["feature_distance"]
    assert (distance["network"], distance["name"]) == ("efficientnet-lite0", "fd_efficientnet")
    assert distance["value"] > 0 and 1 <= found["class_score"]["value"] <= 6
    assert found["network"]["weights_sha256"] == network.sha256
    features = extract_features(random_images(0, 2), network)
    assert features.features.shape == (2, 1280) and features.logits.shape == (2, 1000)


def test_efficientnet_that_is_not_installed_is_one_line_with_the_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(BackendUnavailable, match=r"--network efficientnet.*qncd-cli\[efficientnet"):
        networks.efficientnet()
