"""Features and scores: torch-fidelity's own command gives the same numbers on the same folders."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch_fidelity
from PIL import Image

from qncd_cli.metrics import fidelity, image
from qncd_cli.metrics.features import FashionClassifier, to_classifier_input
from qncd_cli.metrics.protocol import Protocol
from qncd_cli.stages import evaluate

from .shared import gaussian, random_images, save_images


def test_features_are_the_classifiers_own(network) -> None:
    images = random_images(0, 7)
    classifier = FashionClassifier().eval()
    classifier.load_state_dict(safetensors.torch.load_file(network.weights))
    with torch.no_grad():
        features, logits = classifier(to_classifier_input(images))
    seen = []

    def track(items, description, total, unit):
        for item in items:
            yield item
            seen.append((item + 1, total, unit))

    found = image.extract_features(images, network, track=track)
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.logits, logits)
    assert found.features.dtype == torch.float32 and seen[-1] == (7, 7, "images")


def test_features_do_not_depend_on_other_images_their_number_or_grey_storage(network) -> None:
    images = random_images(1, 70)[:, :1]
    every = image.extract_features(images, network)
    for rows in ([0], list(range(69, -1, -1)), [5, 5, 40], list(range(3, 36))):
        some = image.extract_features(images[rows], network)
        assert torch.equal(some.features, every.features[rows]), rows
        assert torch.equal(some.logits, every.logits[rows]), rows
    rgb = image.extract_features(images.expand(-1, 3, -1, -1), network)
    assert torch.equal(rgb.features, every.features)


# ---- torch-fidelity's own numbers ---------------------------------------------------------------


def check(found: dict, theirs: dict) -> None:
    """An entry of metrics.json against what torch-fidelity's command prints."""
    pairs = {
        "frechet_inception_distance": found["feature_distance"]["value"],
        "kernel_inception_distance_mean": found["kernel_distance"]["value"],
        "kernel_inception_distance_std": found["kernel_distance"]["std"],
        "inception_score_mean": found["class_score"]["value"],
        "inception_score_std": found["class_score"]["std"],
        "precision": found["precision"],
        "recall": found["recall"],
    }
    for key, ours in pairs.items():
        assert ours == pytest.approx(theirs[key], rel=1e-5), key


def test_all_numbers_are_torch_fidelitys_on_the_same_folders(network, tmp_path) -> None:
    """Also where files are not named in the order of their numbers: 10.png before 9.png."""
    folders = tmp_path / "a", tmp_path / "b"
    for seed, (folder, count) in enumerate(zip(folders, (230, 190), strict=True)):
        folder.mkdir()
        base = random_images(7, count, size=8) // 2 + random_images(seed, count, size=8) // 8
        for i, pixels in enumerate(base + 10 * seed):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    fidelity.create_extractor(network)  # torch-fidelity knows its name now
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor=network.extractor,
        feature_extractor_weights_path=str(network.weights),
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        kid_subset_size=190,
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        save_cpu_ram=True,  # no worker processes
    )
    reference = image.load_reference(folders[1])
    protocol = Protocol(("fid", "isc", "kid", "prc"), network, reference)
    found = evaluate.measure_images(folders[0], protocol)["images"]
    check(found, theirs)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1


@pytest.mark.slow
def test_the_numbers_of_inception_are_those_of_torch_fidelitys_command(inception, tmp_path) -> None:
    folders = [save_images(tmp_path / name, random_images(i, 8)) for i, name in enumerate("ab")]
    weights = ("--feature-extractor-weights-path", str(inception.weights))
    options = ("--isc", "--fid", "--kid", "--prc", "--cpu", "--no-cache", "--silent", "--json")
    command = [
        *(sys.executable, "-m", "torch_fidelity.fidelity"),
        *("--input1", str(folders[0]), "--input2", str(folders[1])),
        *("--feature-extractor", "inception-v3-compat", *weights, *options),
        *("--kid-subset-size", "8", "--kid-subsets", "1", "--isc-splits", "1"),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    reference = image.load_reference(folders[1])
    protocol = Protocol(("fid", "isc", "kid", "prc"), inception, reference)
    found = evaluate.measure_images(folders[0], protocol)["images"]
    check(found, json.loads(printed))


# ---- the formulas -------------------------------------------------------------------------------


def test_kernel_distance_matches_the_unbiased_estimator() -> None:
    a, b = gaussian(0, 30, 5), gaussian(1, 30, 5) + 0.5
    x, y = a.double().numpy(), b.double().numpy()

    def kernel(u, v):
        return (u @ v.T / 5 + 1) ** 3

    off = ~np.eye(30, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    found = fidelity.kernel_distance(a, b)
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert (found["subset_size"], found["subsets"]) == (30, 1)


def test_kernel_distance_clamps_and_records_the_subset_size() -> None:
    found = fidelity.kernel_distance(gaussian(0, 20, 5), gaussian(1, 50, 5), seed=1)
    assert (found["subset_size"], found["subsets"]) == (20, 100)
    assert found == fidelity.kernel_distance(gaussian(0, 20, 5), gaussian(1, 50, 5), seed=1)


def test_class_score_of_sure_and_unsure_classifiers() -> None:
    sure = 100 * torch.eye(10)[torch.arange(100) % 10]
    assert fidelity.class_score(torch.zeros(100, 10))["value"] == pytest.approx(1.0)
    assert fidelity.class_score(sure[:19]) == {
        "value": pytest.approx(10, rel=0.1), "std": 0.0, "splits": 1
    }  # fmt: skip
    found = fidelity.class_score(sure)
    assert found["splits"] == 10 and 1 < found["value"] < 10


def test_precision_and_recall_tell_which_set_is_narrow() -> None:
    reference = gaussian(0, 200, 2)
    narrow = 0.2 * gaussian(1, 200, 2)
    assert fidelity.within(narrow, reference).float().mean() > 0.9
    assert fidelity.within(reference, narrow).float().mean() < 0.3
    assert fidelity.within(reference, reference).all()
