"""Reading folders of images and references of every kind, and what is wrong with others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import scipy.linalg
import torch
from PIL import Image

from qncd_cli.errors import ArtifactError
from qncd_cli.metrics import frechet, image
from qncd_cli.metrics.fidelity import extract_features
from qncd_cli.metrics.reference import Reference

from .shared import COUNT, gaussian, random_images, save_images

ALL = ("fid", "isc", "kid", "prc")


def test_load_images_sorts_by_name(tmp_path) -> None:
    images = random_images(0, 12, size=8)
    folder = save_images(tmp_path / "set", images)
    (folder / "manifest.json").write_text("{}")
    (folder / "more.png").mkdir()
    (folder / "more.png").rmdir()
    assert torch.equal(image.load_images(folder).read(), images)


def test_load_images_reads_the_usual_kinds(tmp_path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name, mode in (("a.png", "L"), ("b.BMP", "RGB"), ("c.webp", "RGB"), ("d.jpg", "L")):
        Image.fromarray(grey).convert(mode).save(tmp_path / name)
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "e.png")
    images = image.load_images(tmp_path).read()
    assert images.shape == (5, 3, 8, 8)
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, 8, 8))
    assert torch.equal(images[4], images[0])


def test_load_images_errors_name_the_file(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        image.load_images(tmp_path / "none")
    with pytest.raises(ArtifactError, match="no images in this folder"):
        image.load_images(tmp_path)
    folder = save_images(tmp_path / "set", random_images(0, 2, size=8))
    Image.new("RGB", (9, 8)).save(folder / "000002.png")
    with pytest.raises(ArtifactError, match=r"000002\.png: 9x8 pixels, but 000000\.png has 8x8"):
        image.load_images(folder)
    (folder / "000002.png").unlink()
    whole = (folder / "000000.png").read_bytes()
    for broken in (b"", b"text", whole[:60], whole[: len(whole) // 2]):
        (folder / "000001.png").write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"000001\.png: not a readable image"):
            image.load_images(folder)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "000001.png")
    with pytest.raises(ArtifactError, match="more than 8 bits"):
        image.load_images(folder)


def test_every_kind_of_reference_gives_the_same_distance(network, tmp_path) -> None:
    images = random_images(1)
    features = extract_features(images, network).features
    statistics = frechet.statistics(features)
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "statistics.npz", **statistics)
    arrays = {**statistics, "features": features.numpy().astype(np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "reference.safetensors")
    specs = [images, save_images(tmp_path / "set", images)]
    specs += [str(tmp_path / "images.npz"), tmp_path / "statistics.npz"]
    references = [image.load_reference(spec) for spec in specs]
    references.append(image.load_reference("zoo", zoo=tmp_path / "reference.safetensors"))
    mine = extract_features(random_images(0), network)
    values = [
        image.measure(mine, reference, network, {"fid"}, rounds=0).entry["feature_distance"]
        for reference in references
    ]
    for entry in values[1:]:
        assert entry["value"] == pytest.approx(values[0]["value"], rel=1e-6)
    assert [reference.num_samples for reference in references] == [COUNT, COUNT, COUNT, None, COUNT]
    image.measure(mine, references[-1], network, ALL, rounds=0)  # features serve kid and prc


def test_stored_statistics_win_over_images_when_they_fit(network, tmp_path) -> None:
    pixels = random_images(1).permute(0, 2, 3, 1).numpy()
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=pixels, mu=np.zeros(128), sigma=np.eye(128))
    ready = image.prepare_reference(image.load_reference(path), network, ALL)
    assert (ready.statistics["mu"] == 0).all() and ready.features.shape == (COUNT, 128)
    np.savez(path, arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))  # of Inception
    ready = image.prepare_reference(image.load_reference(path), network, ALL)
    assert ready.statistics["mu"].shape == (128,)


def test_reference_that_lacks_what_a_metric_needs(network) -> None:
    small = Reference("s.npz", statistics={"mu": np.zeros(128), "sigma": np.eye(128)})
    with pytest.raises(ArtifactError, match=r"s\.npz: kid needs features, prc needs features"):
        image.measure(random_images(0), small, network, ALL)
    wide = Reference("w.npz", statistics={"mu": np.zeros(2048), "sigma": np.eye(2048)})
    with pytest.raises(ArtifactError, match=r"w\.npz: fid needs mean.*\(128 numbers an image\)"):
        image.measure(random_images(0), wide, network, {"fid"})


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


# ---- files of others ----------------------------------------------------------------------------


def test_statistics_as_adm_pytorch_fid_and_clean_fid_write_them_give_the_same_number(
    network, tmp_path
) -> None:
    """Each by its own formulas, from the same features."""
    images = random_images(1, 40)
    rows = extract_features(images, network).features.numpy()
    spatial = gaussian(3, 40, 7).numpy()
    pixels = images.permute(0, 2, 3, 1).numpy()
    mean, covariance = np.mean(rows, axis=0), np.cov(rows, rowvar=False)
    statistics = {"mu": mean, "sigma": covariance}
    both = {"mu_s": np.mean(spatial, axis=0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels[:10], **statistics, **both)
    np.savez(tmp_path / "adm_images.npz", pixels)
    np.savez_compressed(tmp_path / "pytorch_fid.npz", **statistics)
    np.savez_compressed(tmp_path / "clean_fid.npz", **statistics)
    np.savez_compressed(tmp_path / "clean_kid.npz", feats=rows)
    stand_in = replace(network, spatial_size=7)  # as if it had such a layer
    found = extract_features(random_images(0, 40), network)
    mine = replace(found, spatial=gaussian(4, 40, 7))
    files = ("adm", "adm_images", "pytorch_fid", "clean_fid", "clean_kid")
    values = {}
    for name in files:
        reference = image.load_reference(tmp_path / f"{name}.npz")
        wanted = {"fid", "sfid"} if name == "adm" else {"fid"}
        entry = image.measure(mine, reference, stand_in, wanted, rounds=0).entry
        values[name] = entry["feature_distance"]["value"]
        if name == "adm":
            own = (mine.spatial.numpy(), spatial)
            root = scipy.linalg.sqrtm(np.cov(own[0], rowvar=False) @ both["sigma_s"])
            shift = own[0].mean(0) - both["mu_s"]
            traces = np.trace(np.cov(own[0], rowvar=False)) + np.trace(both["sigma_s"])
            expected = shift @ shift + traces - 2 * np.trace(root).real
            assert entry["spatial_distance"]["value"] == pytest.approx(expected, rel=1e-6)
    assert list(values.values()) == pytest.approx([values["adm"]] * len(files), rel=1e-6)
    known = image.load_reference(tmp_path / "clean_kid.npz")
    assert image.measure(mine, known, stand_in, {"kid"}, rounds=0).entry["kernel_distance"]
    with pytest.raises(ArtifactError, match=r"sfid needs .*mu_s, sigma_s"):
        image.measure(mine, known, stand_in, {"sfid"})


def test_the_order_of_images_changes_no_number(network, tmp_path) -> None:
    """In memory, where their contents order them, and in folders, where their names do."""
    images, other = random_images(0, 130), random_images(1, 90)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    first, again = (
        image.measure(mine, image.load_reference(its), network, ALL).entry
        for mine, its in ((images, other), (images[order], other.flip(0)))
    )
    assert first == again
    folder = save_images(tmp_path / "set", images)
    names = sorted(folder.iterdir())
    one, two = (
        extract_features(images[list(rows)], network, names=[names[i] for i in rows])
        for rows in (range(130), order.tolist())
    )
    reference = image.load_reference(other)
    measured = [image.measure(some, reference, network, ALL).entry for some in (one, two)]
    assert measured[0] == measured[1]
