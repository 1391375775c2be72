"""Image metrics against closed forms and direct computation; names, references and errors.

Classifier weights and statistics are random stand-ins in a temporary folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorInceptionV3

from qncd_cli.errors import ArtifactError, BackendUnavailable
from qncd_cli.metrics import fidelity, image, networks
from qncd_cli.metrics.features import FashionClassifier, to_classifier_input

COUNT = 12


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> networks.FeatureNetwork:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    safetensors.torch.save_file(FashionClassifier().half().state_dict(), path)
    return image.packaged(path)


def _images(seed: int, count: int = COUNT, low: int = 0, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(low, 256, shape, dtype=torch.uint8, generator=generator)


def _save(folder: Path, images: torch.Tensor, suffix: str = ".png") -> Path:
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}{suffix}")
    return folder


def _gaussian(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---- features and the Frechet ladder ------------------------------------------------------------


def test_features_are_the_classifiers_own(network) -> None:
    images = _images(0, 7)
    classifier = FashionClassifier().eval()
    classifier.load_state_dict(safetensors.torch.load_file(network.weights))
    with torch.no_grad():
        features, logits = classifier(to_classifier_input(images))
    seen = []

    def track(items, description, total, unit):
        for item in items:
            yield item
            seen.append((item + 1, total, unit))

    found = image.extract_features(images, network, batch_size=3, track=track)
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.logits, logits)
    assert found.features.dtype == torch.float32 and seen[-1] == (7, 7, "images")


def test_features_do_not_depend_on_the_batch_size_or_grey_storage(network) -> None:
    images = _images(1, 9)[:, :1]
    one, many = (image.extract_features(images, network, batch_size=size) for size in (1, 64))
    rgb = image.extract_features(images.expand(-1, 3, -1, -1), network)
    torch.testing.assert_close(one.features, many.features)
    torch.testing.assert_close(rgb.features, many.features)


def test_frechet_statistics_match_numpy() -> None:
    features = _gaussian(0, 40, 6)
    statistics = image.frechet_statistics(features)
    assert statistics["mu"].dtype == statistics["sigma"].dtype == np.float64
    np.testing.assert_allclose(statistics["mu"], features.double().numpy().mean(0), rtol=1e-12)
    centred = features.double().numpy() - statistics["mu"]
    np.testing.assert_allclose(statistics["sigma"], centred.T @ centred / 39, rtol=1e-9, atol=1e-12)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    rng = np.random.default_rng(0)
    mu_a, mu_b = rng.normal(size=(2, 16))
    var_a, var_b = rng.uniform(0.1, 3, size=(2, 16))
    expected = ((mu_a - mu_b) ** 2).sum() + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    a = {"mu": mu_a, "sigma": np.diag(var_a)}
    b = {"mu": mu_b, "sigma": np.diag(var_b)}
    assert image.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert image.frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    features = _gaussian(1, 200, 12).double()
    a, b = (image.frechet_statistics(features + shift) for shift in (0.0, 0.5))
    assert image.frechet_distance(a, b) == pytest.approx(12 * 0.25, rel=1e-6)


def test_frechet_distance_of_fewer_samples_than_features_is_defined() -> None:
    few = image.frechet_statistics(_gaussian(2, 5, 32))
    assert image.frechet_distance(few, few) == pytest.approx(0.0, abs=1e-4)
    other = image.frechet_statistics(_gaussian(3, 5, 32))
    assert math.isfinite(image.frechet_distance(few, other))


def test_interval_encloses_the_value_and_is_seeded() -> None:
    a, b = _gaussian(0, 60, 8), _gaussian(1, 80, 8) + 0.2
    value, low, high = image.frechet_interval(a, b, rounds=20, seed=3)
    assert value == image.frechet_distance(image.frechet_statistics(a), image.frechet_statistics(b))
    assert 0 <= low < value < high
    assert image.frechet_interval(a, b, rounds=20, seed=3) == (value, low, high)
    assert image.frechet_interval(a, b, rounds=20, seed=4)[1:] != (low, high)
    fixed = image.frechet_interval(a, image.frechet_statistics(b), rounds=20, seed=3)
    assert fixed[0] == value and fixed[1] < value < fixed[2]


def test_interval_of_95_percent_covers_the_distance_of_other_sets() -> None:
    reference = {"mu": np.zeros(4), "sigma": np.eye(4)}
    truth = np.median(
        [
            image.frechet_distance(image.frechet_statistics(_gaussian(s, 100, 4) + 0.5), reference)
            for s in range(100, 160)
        ]
    )
    intervals = [
        image.frechet_interval(_gaussian(s, 100, 4) + 0.5, reference, rounds=40) for s in range(30)
    ]
    assert sum(low <= truth <= high for _, low, high in intervals) >= 24


def test_paired_interval_is_narrower_for_paired_sets() -> None:
    full = _gaussian(0, 100, 8)
    quantized = full + 0.05 * _gaussian(1, 100, 8) + 0.1
    _, low, high = image.frechet_interval(full, quantized, rounds=30, paired=True)
    _, low_apart, high_apart = image.frechet_interval(full, quantized, rounds=30)
    assert high - low < (high_apart - low_apart) / 2
    with pytest.raises(ValueError, match="same number"):
        image.frechet_interval(full, quantized[:50], paired=True)


# ---- the other formulas -------------------------------------------------------------------------


def test_kernel_distance_matches_the_unbiased_estimator() -> None:
    a, b = _gaussian(0, 30, 5), _gaussian(1, 30, 5) + 0.5
    x, y = a.double().numpy(), b.double().numpy()

    def kernel(u, v):
        return (u @ v.T / 5 + 1) ** 3

    off = ~np.eye(30, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    found = fidelity.kernel_distance(a, b)
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert (found["subset_size"], found["subsets"]) == (30, 1)


def test_kernel_distance_clamps_and_records_the_subset_size() -> None:
    found = fidelity.kernel_distance(_gaussian(0, 20, 5), _gaussian(1, 50, 5), seed=1)
    assert (found["subset_size"], found["subsets"]) == (20, 100)
    assert found == fidelity.kernel_distance(_gaussian(0, 20, 5), _gaussian(1, 50, 5), seed=1)


def test_class_score_of_sure_and_unsure_classifiers() -> None:
    sure = 100 * torch.eye(10)[torch.arange(100) % 10]
    assert fidelity.class_score(torch.zeros(100, 10))["value"] == pytest.approx(1.0)
    assert fidelity.class_score(sure[:19]) == {
        "value": pytest.approx(10, rel=0.1), "std": 0.0, "splits": 1
    }  # fmt: skip
    found = fidelity.class_score(sure)
    assert found["splits"] == 10 and 1 < found["value"] < 10


def test_precision_and_recall_tell_which_set_is_narrow() -> None:
    reference = _gaussian(0, 200, 2)
    narrow = fidelity.precision_recall(0.2 * _gaussian(1, 200, 2), reference)
    assert narrow["precision"] > 0.9 and narrow["recall"] < 0.3
    same = fidelity.precision_recall(reference, reference)
    assert same["precision"] == same["recall"] == 1.0


# ---- measure ------------------------------------------------------------------------------------


def test_measure_names_the_packaged_network_and_never_says_fid(network) -> None:
    reference = image.load_reference(_images(1))
    found = image.measure(_images(0), reference, network, bootstrap_rounds=2)
    assert found["fid"] is found["kid"] is found["inception_score"] is found["sfid"] is None
    distance = found["feature_distance"]
    assert (distance["network"], distance["name"]) == ("fashion-classifier", "fd_fashion")
    assert distance["low"] <= distance["value"] <= distance["high"]
    for key in ("kernel_distance", "class_score", "precision_recall"):
        assert found[key]["network"] == "fashion-classifier"
    assert 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert found["num_samples"] == COUNT
    assert found["reference"] == {"source": "images", "num_samples": COUNT}
    assert found["network"]["weights_sha256"] == network.sha256


def test_measure_is_repeatable_and_accepts_features(network) -> None:
    reference = image.prepare_reference(image.load_reference(_images(1)), network)
    features = image.extract_features(_images(0), network)
    options = {"bootstrap_rounds": 2, "seed": 5}
    first = image.measure(features, reference, network, **options)
    assert first == image.measure(_images(0), reference, network, **options)


def test_measure_only_what_is_asked(network) -> None:
    found = image.measure(_images(0), None, network, {"isc"})
    assert found["class_score"]["value"] >= 1 and found["reference"] is None
    assert found["feature_distance"] is found["kernel_distance"] is found["precision"] is None


def test_measure_of_the_reference_itself_is_zero(network) -> None:
    reference = image.load_reference(_images(0))
    found = image.measure(_images(0), reference, network, {"fid", "prc"}, bootstrap_rounds=0)
    assert found["feature_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1.0


def test_feature_distance_grows_with_the_difference(network) -> None:
    full = _images(0)
    near = full.clone()
    near[:, :, :2] = 0
    values = [
        image.feature_distance(full, other, network, paired=True, bootstrap_rounds=0)
        for other in (full, near, _images(0, low=200))
    ]
    assert [entry["name"] for entry in values] == ["fd_fashion"] * 3
    assert values[0]["value"] < 1e-6 < values[1]["value"] < values[2]["value"]
    assert image.feature_distance(full, near, network, bootstrap_rounds=0)["low"] is None


def test_class_agreement(network) -> None:
    images = _images(0, 10)
    predicted = image.extract_features(images, network).logits.argmax(1)
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
        image.measure(_images(0), None, network, {"fdi"})
    with pytest.raises(ArtifactError, match="need a reference"):
        image.measure(_images(0), None, network)
    with pytest.raises(ArtifactError, match="the samples: too few images, 3: prc needs 4"):
        image.measure(_images(0, 3), image.load_reference(_images(1)), network, {"prc"})
    with pytest.raises(ArtifactError, match="reference images: too few images, 1"):
        image.measure(_images(0), image.load_reference(_images(1, 1)), network, {"fid"})
    with pytest.raises(ValueError, match="uint8"):
        image.extract_features(_images(0).float(), network)
    with pytest.raises(BackendUnavailable, match="mps"):
        image.extract_features(_images(0), network, device="mps")
    other = image.Features("another", torch.zeros(4, 128), torch.zeros(4, 10))
    with pytest.raises(ValueError, match="features of another"):
        image.measure(other, None, network, {"isc"})


# ---- weights ------------------------------------------------------------------------------------


def test_missing_and_damaged_classifier(tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.safetensors: No such file.*reinstall"):
        image.packaged(tmp_path / "none.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path in (bad, tmp_path / "other.safetensors"):
        with pytest.raises(ArtifactError, match="not the weights of fashion-classifier"):
            image.extract_features(_images(0, 2), image.packaged(path))
    torch.manual_seed(0)
    state = FashionClassifier().state_dict()
    state["head.weight"][0, 0] = math.nan
    safetensors.torch.save_file(state, bad)
    with pytest.raises(ArtifactError, match="not finite"):
        image.extract_features(_images(0, 2), image.packaged(bad))


def test_inception_download_fails_in_one_line(monkeypatch, tmp_path) -> None:
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        BackendUnavailable, match=r"cannot be downloaded.*--inception-weights FILE"
    ) as caught:
        image.inception()
    assert "\n" not in str(caught.value)


def test_inception_file_is_checked_and_never_executed(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        image.inception(tmp_path / "none.pth")
    path = tmp_path / "bad.pth"
    path.write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match=r"bad\.pth"):
        image.inception(path)
    torch.save({"call": print}, path)
    with pytest.raises(ArtifactError, match="refused"):
        image.inception(path)
    torch.save({"fc.weight": torch.zeros(10, 2048)}, path)
    with pytest.raises(ArtifactError, match=r"fc\.weight \[1008, 2048\]"):
        image.inception(path)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(ArtifactError, match="not the weights of inception"):
        image.extract_features(_images(0, 2), image.inception(path))


def test_only_the_published_inception_weights_make_a_fid(monkeypatch, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    # a Frechet distance of 2,048 features takes minutes of CPU here: cut it short
    monkeypatch.setattr(image, "frechet_distance", lambda *_: 7.0)
    known = image.Reference("r", statistics={"mu": np.zeros(2048), "sigma": np.eye(2048)})
    rows = _gaussian(0, 4, 2048), _gaussian(1, 4, 1008)

    stand_in = image.inception(path)
    assert stand_in.name == f"inception-v3-compat@{stand_in.sha256[:8]}"
    assert not stand_in.is_fid
    features = image.Features(stand_in.name, *rows)
    found = image.measure(features, known, stand_in, {"fid", "isc"})
    assert found["fid"] is found["inception_score"] is None
    assert found["feature_distance"]["name"] == f"fd_{stand_in.name}"
    assert found["feature_distance"]["low"] is None  # no bootstrap at this width

    monkeypatch.setattr(networks, "INCEPTION_SHA256", stand_in.sha256)
    real = image.inception(path)
    found = image.measure(image.Features(real.name, *rows), known, real, {"fid", "isc"})
    assert real.is_fid
    assert found["fid"] == found["feature_distance"]["value"] == 7.0
    assert found["inception_score"] == found["class_score"]["value"] > 0


@pytest.mark.slow
def test_features_of_torch_fidelitys_inception(monkeypatch, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    with monkeypatch.context() as patch:  # random weights in the shape of the real ones
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "unused")
    torch.save({key: value.half() for key, value in model.state_dict().items()}, path)
    found = image.extract_features(_images(0, 1), image.inception(path))
    assert found.features.shape == (1, 2048)
    assert found.logits.shape == (1, 1008)


# ---- folders and references ---------------------------------------------------------------------


def test_load_images_sorts_by_name(tmp_path) -> None:
    images = _images(0, 12, size=8)
    folder = _save(tmp_path / "set", images)
    (folder / "manifest.json").write_text("{}")
    (folder / "more.png").mkdir()
    (folder / "more.png").rmdir()
    assert torch.equal(image.load_images(folder), images)


def test_load_images_reads_the_usual_kinds(tmp_path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name, mode in (("a.png", "L"), ("b.BMP", "RGB"), ("c.webp", "RGB"), ("d.jpg", "L")):
        Image.fromarray(grey).convert(mode).save(tmp_path / name)
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "e.png")
    images = image.load_images(tmp_path)
    assert images.shape == (5, 3, 8, 8)
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, 8, 8))
    assert torch.equal(images[4], images[0])


def test_load_images_errors_name_the_file(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        image.load_images(tmp_path / "none")
    with pytest.raises(ArtifactError, match="no images in this folder"):
        image.load_images(tmp_path)
    folder = _save(tmp_path / "set", _images(0, 2, size=8))
    Image.new("RGB", (9, 8)).save(folder / "000002.png")
    with pytest.raises(ArtifactError, match=r"000002\.png: 9x8 pixels, but 000000\.png has 8x8"):
        image.load_images(folder)
    whole = (folder / "000000.png").read_bytes()
    for broken in (b"", b"text", whole[:60], whole[: len(whole) // 2]):
        (folder / "000001.png").write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"000001\.png: not a readable image"):
            image.load_images(folder)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "000001.png")
    with pytest.raises(ArtifactError, match="more than 8 bits"):
        image.load_images(folder)


def test_every_kind_of_reference_gives_the_same_distance(network, tmp_path) -> None:
    images = _images(1)
    features = image.extract_features(images, network).features
    statistics = image.frechet_statistics(features)
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "statistics.npz", **statistics)
    arrays = {**statistics, "features": features.numpy().astype(np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "reference.safetensors")
    specs = [images, _save(tmp_path / "set", images)]
    specs += [str(tmp_path / "images.npz"), tmp_path / "statistics.npz"]
    references = [image.load_reference(spec) for spec in specs]
    references.append(image.load_reference("zoo", zoo=tmp_path / "reference.safetensors"))
    mine = image.extract_features(_images(0), network)
    values = [
        image.measure(mine, reference, network, {"fid"}, bootstrap_rounds=0)["feature_distance"]
        for reference in references
    ]
    for entry in values[1:]:
        assert entry["value"] == pytest.approx(values[0]["value"], rel=1e-6)
    assert [reference.num_samples for reference in references] == [COUNT, COUNT, COUNT, None, COUNT]
    image.measure(mine, references[-1], network, bootstrap_rounds=0)  # features serve kid and prc


def test_stored_statistics_win_over_images_when_they_fit(network, tmp_path) -> None:
    pixels = _images(1).permute(0, 2, 3, 1).numpy()
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=pixels, mu=np.zeros(128), sigma=np.eye(128))
    ready = image.prepare_reference(image.load_reference(path), network)
    assert (ready.statistics["mu"] == 0).all() and ready.features.shape == (COUNT, 128)
    np.savez(path, arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))  # of Inception
    ready = image.prepare_reference(image.load_reference(path), network)
    assert ready.statistics["mu"].shape == (128,)


def test_reference_that_lacks_what_a_metric_needs(network) -> None:
    small = image.Reference("s.npz", statistics={"mu": np.zeros(128), "sigma": np.eye(128)})
    with pytest.raises(ArtifactError, match=r"s\.npz: kid needs features, prc needs features"):
        image.measure(_images(0), small, network)
    wide = image.Reference("w.npz", statistics={"mu": np.zeros(2048), "sigma": np.eye(2048)})
    with pytest.raises(ArtifactError, match=r"w\.npz: fid needs mean.*\(128 numbers an image\)"):
        image.measure(_images(0), wide, network, {"fid"})


def test_reference_files_that_are_wrong(tmp_path) -> None:
    def check(name: str, match: str) -> None:
        with pytest.raises(ArtifactError, match=match) as caught:
            image.load_reference(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)

    check("none.npz", "no such reference")
    with pytest.raises(ArtifactError, match="reinstall"):
        image.load_reference("zoo", zoo=tmp_path / "missing.safetensors")
    (tmp_path / "a.txt").write_text("x")
    check("a.txt", "not a kind of reference")
    for name in ("b.npz", "b.safetensors"):
        (tmp_path / name).write_bytes(b"PK garbage")
        check(name, "damaged")
    np.savez(tmp_path / "c.npz", mu=np.zeros(3))
    check("c.npz", "holds mu of")
    np.savez(tmp_path / "d.npz", other=np.zeros(3))
    check("d.npz", "holds nothing of")
    np.savez(tmp_path / "e.npz", mu=np.zeros(3), sigma=np.eye(2))
    check("e.npz", r"mu \[3\], sigma \[2, 2\]")
    np.savez(tmp_path / "f.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    check("f.npz", "not finite")
    np.savez(tmp_path / "g.npz", np.zeros((2, 3, 8, 8), np.float32))
    check("g.npz", "arr_0 is float32")
    np.savez(tmp_path / "h.npz", mu=np.array([None, 1]), sigma=np.eye(2))
    check("h.npz", "damaged")
