"""The metrics of a set, their names, intervals and errors."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.errors import ArtifactError, BackendUnavailable
from qncd_cli.metrics import image
from qncd_cli.metrics.fidelity import Features, extract_features

from .shared import COUNT, random_images

ALL = ("fid", "isc", "kid", "prc")


def test_measure_names_the_packaged_network_and_never_says_fid(network) -> None:
    reference = image.load_reference(random_images(1))
    found = image.measure(random_images(0), reference, network, ALL, rounds=9).entry
    assert found["fid"] is found["kid"] is found["inception_score"] is found["sfid"] is None
    distance = found["feature_distance"]
    assert (distance["network"], distance["name"]) == ("fashion-classifier", "fd_fashion")
    assert distance["low"] <= distance["value"] <= distance["high"]
    for key in ("kernel_distance", "class_score"):
        assert found[key]["network"] == "fashion-classifier"
        assert found[key]["low"] < found[key]["value"] < found[key]["high"]
    for key in ("precision", "recall"):
        entry = found["precision_recall"][key]
        assert 0 <= entry["low"] <= entry["value"] == found[key] <= entry["high"] <= 1
    assert 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert found["num_samples"] == COUNT
    assert found["reference"] == {"source": "images", "num_samples": COUNT}
    assert found["network"]["weights_sha256"] == network.sha256


def test_measure_is_repeatable_and_accepts_features(network) -> None:
    reference = image.prepare_reference(image.load_reference(random_images(1)), network, ALL)
    features = extract_features(random_images(0), network)
    options = {"rounds": 2, "seed": 5}
    first = image.measure(features, reference, network, ALL, **options)
    again = image.measure(random_images(0), reference, network, ALL, **options)
    assert first.entry == again.entry


def test_measure_only_what_is_asked(network) -> None:
    found = image.measure(random_images(0), None, network, {"isc"}).entry
    assert found["class_score"]["value"] >= 1 and found["reference"] is None
    assert found["feature_distance"] is found["kernel_distance"] is found["precision"] is None


def test_measure_of_the_reference_itself_is_zero(network) -> None:
    reference = image.load_reference(random_images(0))
    found = image.measure(random_images(0), reference, network, {"fid", "prc"}, rounds=0).entry
    assert found["feature_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1.0


def test_feature_distance_grows_with_the_difference(network) -> None:
    full = random_images(0)
    near = full.clone()
    near[:, :, :2] = 0
    values = [
        image.feature_distance(full, other, network, paired=True, rounds=0)
        for other in (full, near, random_images(0, low=200))
    ]
    assert [entry["name"] for entry in values] == ["fd_fashion"] * 3
    assert values[0]["value"] < 1e-6 < values[1]["value"] < values[2]["value"]
    assert image.feature_distance(full, near, network, rounds=0)["low"] is None


def test_class_agreement(network) -> None:
    images = random_images(0, 10)
    predicted = extract_features(images, network).logits.argmax(1)
    wrong = predicted.clone()
    wrong[:4] = (wrong[:4] + 1) % 10
    assert image.class_agreement(images, predicted, network) == 1.0
    assert image.class_agreement(images, wrong.tolist(), network) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="10 images need as many labels"):
        image.class_agreement(images, wrong[:3], network)
    with pytest.raises(ValueError, match=r"0\.\.9"):
        image.class_agreement(images, [11] * 10, network)


def test_measure_errors(network, tmp_path) -> None:
    with pytest.raises(ValueError, match="fdi"):
        image.measure(random_images(0), None, network, {"fdi"})
    with pytest.raises(ArtifactError, match="need a reference"):
        image.measure(random_images(0), None, network, ALL)
    with pytest.raises(ArtifactError, match="the samples: too few images, 3: prc needs 4"):
        image.measure(random_images(0, 3), image.load_reference(random_images(1)), network, {"prc"})
    with pytest.raises(ArtifactError, match="reference images: too few images, 1"):
        image.measure(random_images(0), image.load_reference(random_images(1, 1)), network, {"fid"})
    with pytest.raises(ValueError, match="uint8"):
        extract_features(random_images(0).float(), network)
    with pytest.raises(BackendUnavailable, match="mps"):
        extract_features(random_images(0), network, device="mps")
    other = Features("another", torch.zeros(4, 128), torch.zeros(4, 10))
    with pytest.raises(ValueError, match="features of another"):
        image.measure(other, None, network, {"isc"})
