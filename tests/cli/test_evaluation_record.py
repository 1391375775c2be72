"""metrics.json over several calls, numbers of single samples, and which runs may be compared."""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Qncd, packaged, rewrite_latents, tiny_config
from PIL import Image
from safetensors.torch import load_file

from qncd_cli.config import model_card
from qncd_cli.store.files import read_json, write_sealed_json
from qncd_cli.vocabulary import IDENTICAL_DB

RUN = Path("runs/tiny")
REFERENCE = ("--reference", "reference")


def save_images(folder: Path, first: int, count: int = 6) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        generator = torch.Generator().manual_seed(first + i)
        pixels = torch.randint(20 * i, 256, (16, 16), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model) -> Iterator[Path]:
    """A sampled run of a packaged model, and a reference. Copy before changing."""
    runner = Qncd(tmp_path_factory.mktemp("made"))
    with packaged(tiny_model) as source:
        runner.write_config(
            tiny_config(
                source,
                calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
                quantization__weights__rounding="nearest",
            )
        )
        runner("calibrate", "--config", "tiny.yaml")
        runner("quantize")
        runner("sample", "--num", "6", "--batch-size", "4")
        save_images(runner.folder / "reference", 0)
        yield runner.folder


@pytest.fixture
def work(made, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(made, tmp_path / "work"))


def metrics_of(runner: Qncd, run: Path = RUN) -> dict:
    found: dict = read_json(runner.folder / run / "metrics.json", "qncd eval")
    return found


# ---- metrics add up -----------------------------------------------------------------------------


def test_later_metrics_of_the_same_protocol_are_added(work):
    work("eval", "--fid", *REFERENCE)
    first = metrics_of(work)
    assert first["quantized"]["class_score"] is None
    printed = work("eval", "--isc", "--json").data
    both = metrics_of(work)
    assert {**both, "run_dir": printed["run_dir"]} == printed
    assert both["protocol"]["metrics"] == ["fid", "isc"]
    assert both["protocol"]["reference"] == "reference"
    for name in ("full", "quantized"):
        assert both[name]["feature_distance"] == first[name]["feature_distance"]
        assert both[name]["class_score"]["value"] >= 1
    assert "class score" in (work.folder / RUN / "report.html").read_text()
    work("eval", "--kid", "--prc", *REFERENCE)
    assert metrics_of(work)["protocol"]["metrics"] == ["fid", "isc", "kid", "prc"]
    work("eval", "--fid", *REFERENCE)
    assert (
        metrics_of(work)["quantized"]["feature_distance"] == first["quantized"]["feature_distance"]
    )


@pytest.fixture
def known(work, tiny_model, monkeypatch, tmp_path) -> Qncd:
    """The same, of a packaged model whose digest is known without loading it."""
    (tmp_path / "fashion-tiny").symlink_to(tiny_model)
    monkeypatch.setattr(model_card, "_ZOO", tmp_path)
    return work


def test_numbers_that_the_record_holds_are_not_measured_again(known):
    work = known
    work("eval", "--fid", "--isc", *REFERENCE)
    work("eval", "--kid", *REFERENCE)
    for flags in (("--fid",), ("--isc", "--kid"), ()):
        assert "unchanged, skipped" in work("eval", *flags, *REFERENCE).stdout, flags
    assert "unchanged" not in work("eval", "--prc", *REFERENCE).stdout
    assert "unchanged, skipped" in work("eval", "--fid", *REFERENCE).stdout
    replace_an_image_of_the_reference(work)
    assert "unchanged" not in work("eval", "--fid", *REFERENCE).stdout
    assert "unchanged" not in work("eval", "--isc", *REFERENCE).stdout, "of the other reference"


def test_a_number_against_another_reference_is_none_of_this_one(known):
    """Without a name the packaged reference is meant."""
    work = known
    work("eval", "--isc")
    work("eval", "--fid", *REFERENCE)
    assert "unchanged, skipped" in work("eval", "--isc").stdout
    assert "unchanged" not in work("eval", "--fid").stdout
    assert metrics_of(work)["protocol"]["reference"] == "zoo"


def replace_an_image_of_the_reference(runner: Qncd) -> None:
    save_images(runner.folder / "reference", 50, 1)


def draw_more_samples(runner: Qncd) -> None:
    runner("sample", "--num", "8", "--batch-size", "4")


@pytest.mark.parametrize(
    "change",
    [replace_an_image_of_the_reference, draw_more_samples],
    ids=lambda f: f.__name__,
)
def test_metrics_of_another_protocol_replace_them(work, change):
    work("eval", "--isc", "--fid", *REFERENCE)
    change(work)
    work("eval", "--kid", *REFERENCE)
    metrics = metrics_of(work)
    assert metrics["protocol"]["metrics"] == ["kid"]
    assert metrics["quantized"]["class_score"] is None


def test_a_reference_of_another_name_and_the_same_content_is_the_same(work):
    work("eval", "--isc", "--fid", *REFERENCE)
    (work.folder / "reference").rename(work.folder / "renamed")
    work("eval", "--kid", "--reference", "renamed")
    assert metrics_of(work)["protocol"]["metrics"] == ["fid", "isc", "kid"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"protocol": 3}'])
def test_a_damaged_record_is_replaced(work, content):
    (work.folder / RUN / "metrics.json").write_text(content)
    work("eval")
    assert metrics_of(work)["protocol"]["metrics"] == ["fid"]


# ---- single samples -----------------------------------------------------------------------------


def test_one_changed_image_is_counted_and_does_not_hide_the_others(work):
    work("sample", "--full-precision", "--num", "6", "--batch-size", "4")
    full, quantized = (work.folder / RUN / "samples" / name for name in ("full", "quantized"))
    rewrite_latents(quantized)
    for seed in range(6):  # one grey value of every image: 48.13 dB + 10 log10(256) = 72.21 dB
        pixels = Image.open(full / f"{seed:06d}.png").copy()
        value = pixels.getpixel((0, 0))
        pixels.putpixel((0, 0), value + 1 if value < 255 else value - 1)
        pixels.save(quantized / f"{seed:06d}.png")
    inverted = Image.open(full / "000004.png").point(lambda v: (v + 128) % 256)  # 5.99 dB
    inverted.save(quantized / "000004.png")
    shutil.copy(full / "000002.png", quantized / "000002.png")
    fidelity = work("eval", "--json").data["fidelity"]
    psnr = fidelity["per_seed"]["psnr_db"]
    assert psnr["2"] == IDENTICAL_DB == 200.0
    assert psnr["4"] == pytest.approx(5.987, abs=1e-3)
    assert [psnr[s] for s in "0135"] == pytest.approx([72.213] * 4, abs=1e-3)
    assert fidelity["psnr_db"] == pytest.approx(13.77, abs=0.01)  # one of six
    assert fidelity["psnr_median_db"] == pytest.approx(72.213, abs=1e-3)
    expected = torch.tensor(list(psnr.values()), dtype=torch.float64).quantile(0.05)
    assert fidelity["psnr_q05_db"] == pytest.approx(float(expected))
    assert fidelity["changed"] == 1
    shown = work("eval").stdout
    assert "13.77" in shown and "72.21" in shown and "changed images" in shown
    report = (work.folder / RUN / "report.html").read_text()
    captions = [part.split("<")[0] for part in report.split("<figcaption>")[1:]]
    assert captions[0].startswith("seed 4, ") and captions[0].endswith("PSNR 5.987 dB")
    assert captions[-1].startswith("seed 2, ")
    assert len(captions) == 6


def test_decibels_of_latents_by_seed_are_those_of_the_files(work):
    data = work("eval", "--json").data
    full, quantized = (
        load_file(work.folder / path / "latents.safetensors")["latents"].double()
        for path in (data["protocol"]["full"], data["protocol"]["quantized"])
    )
    noise = (quantized - full).square().flatten(1).sum(1)
    expected = 10 * (full.square().flatten(1).sum(1) / noise).log10()
    found = data["fidelity"]["per_seed"]["sqnr_db"]
    assert list(found) == [str(seed) for seed in range(6)]
    assert list(found.values()) == pytest.approx(expected.tolist())
    assert data["fidelity"]["sqnr_median_db"] == pytest.approx(expected.quantile(0.5).item())


# ---- full precision of the seeds that are there -------------------------------------------------


def test_seeds_between_two_ranges_are_not_drawn(work):
    for first in ("0", "1000000"):
        work("sample", "--seed", first, "--num", "4", "--name", "gaps", "--batch-size", "3")
    data = work("eval", "--name", "gaps", "--json").data
    assert data["protocol"]["num_samples"] == 8
    assert data["protocol"]["seeds"] == "0-3,1000000-1000003"
    (full,) = (work.folder / "runs/full-precision").glob("*/manifest.json")
    assert len(list(full.parent.glob("*.png"))) == 8
    work("sample", "--num", "7", "--name", "gaps", "--batch-size", "3")
    work("eval", "--name", "gaps")
    assert len(list(full.parent.glob("*.png"))) == 11
    work("sample", "--full-precision", "--num", "7", "--name", "again", "--batch-size", "7")
    both = [
        load_file(folder / "latents.safetensors")["latents"][:7]
        for folder in (full.parent, work.folder / RUN / "samples/again")
    ]
    assert torch.allclose(*both, atol=1e-4), "a sample is the same in any batch"


# ---- checks before numbers ----------------------------------------------------------------------


def test_faults_of_images_are_noted_on_stderr_in_the_record_and_in_the_report(work):
    folder = work.folder / RUN / "samples/quantized"
    rewrite_latents(folder)
    shutil.copy(folder / "000001.png", folder / "000000.png")
    result = work("eval", "--fid", *REFERENCE)
    repeated = "quantized: 1 of 6 images repeat an earlier one (first: seed 1, like seed 0)"
    assert repeated in result.stderr.splitlines()
    few = "6 images are few for the 128 features of fashion-classifier: even images like"
    assert any(line.startswith(few) for line in result.stderr.splitlines())
    notes = metrics_of(work)["checks"]
    assert [note["what"] for note in notes] == ["duplicates", "too_few", "too_few"]
    work("eval", "--isc", *REFERENCE)
    assert metrics_of(work)["checks"] == notes, "numbers that stay keep what was said of them"
    report = (work.folder / RUN / "report.html").read_text()
    assert all(note["says"] in html.unescape(report) for note in notes)
    assert repeated in work("eval", "--isc", *REFERENCE).stderr, "also where nothing is done again"


# ---- which runs may be compared -----------------------------------------------------------------


@pytest.fixture
def two(work) -> Qncd:
    """Two runs measured alike."""
    work("eval", "--fid", *REFERENCE)
    shutil.copytree(work.folder / RUN, work.folder / "runs/other")
    return work


def test_runs_with_a_reference_of_the_same_name_and_other_images_are_refused(two):
    assert two("compare", "runs/tiny", "runs/other").exit_code == 0
    replace_an_image_of_the_reference(two)
    two("eval", "--fid", *REFERENCE, "--run-dir", "runs/other")
    result = two("compare", "runs/tiny", "runs/other", ok=False)
    assert result.exit_code == 4
    assert "different protocols: reference_sha256 " in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_runs_of_different_models_are_refused(two):
    path, metrics = two.folder / "runs/other/metrics.json", metrics_of(two, Path("runs/other"))
    metrics["protocol"]["model"] = "another"
    write_sealed_json(path, metrics)
    result = two("compare", "runs/tiny", "runs/other", ok=False)
    assert "different protocols: model " in result.stderr and "against another" in result.stderr


def change_protocol(runner: Qncd, **changes) -> None:
    path, metrics = (
        runner.folder / "runs/other/metrics.json",
        metrics_of(runner, Path("runs/other")),
    )
    metrics["protocol"] |= changes
    write_sealed_json(path, metrics)


def test_a_forced_comparison_shows_what_differs_and_full_precision_of_each_protocol(two):
    steps = metrics_of(two)["protocol"]["sampling"]
    change_protocol(two, sampling={**steps, "steps": 50}, num_samples=8)
    refused = two("compare", "runs/tiny", "runs/other", ok=False)
    assert refused.exit_code == 4
    assert "num_samples 6 against 8; sampling.steps 4 against 50 (" in refused.stderr
    found = two("compare", "runs/tiny", "runs/other", "--force-compare", "--json").data
    assert found["differing"] == ["num_samples", "sampling.steps"]
    names = [(row["name"], row["differs"]["sampling.steps"]) for row in found["rows"]]
    assert names == [("full precision", 4), ("full precision", 50), ("tiny", 4), ("other", 50)]
    table = two("compare", "runs/tiny", "runs/other", "--force-compare").stdout
    assert "Not measured alike: num_samples, sampling.steps" in table and "50" in table


def test_what_changes_numbers_by_rounding_is_a_remark(two):
    change_protocol(two, backend="another", libraries={"torch": "1.0"})
    compared = two("compare", "runs/tiny", "runs/other")
    assert "against another; libraries." in compared.stderr
    assert "libraries.torch " in compared.stderr and "against 1.0" in compared.stderr
    assert len(compared.stderr.splitlines()) == 1


def test_the_protocol_says_how_images_were_made_and_measured(work):
    work("eval", "--fid", *REFERENCE)
    protocol = metrics_of(work)["protocol"]
    digests = ("model", "artifact", "network_sha256", "reference_sha256")
    assert all(len(protocol[key]) >= 16 for key in digests)
    assert protocol["sampling"].items() >= {"scheduler": "ddim", "steps": 4}.items()
    assert protocol["sampling"]["guidance_scale"] == 2.0
    assert (protocol["seeds"], protocol["num_samples"]) == ("0-5", 6)
    assert protocol["class_counts"] == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert protocol["image_size"] == [16, 16] and protocol["pixel_range"] == [0, 255]
    assert protocol["resize"].startswith("grey, 32x32")
    assert protocol["libraries"]["torch"] == torch.__version__
    assert protocol["device"] == {"full": "cpu", "quantized": "cpu", "features": "cpu"}
    assert protocol["backend"] in ("int8", "simulate") and protocol["machine"]["threads"] >= 1


def test_records_of_a_version_that_knew_less_go_on_and_are_compared(two):
    path, metrics = two.folder / "runs/other/metrics.json", metrics_of(two, Path("runs/other"))
    for key in ("image_size", "resize", "pixel_range", "libraries", "machine", "device", "backend"):
        del metrics["protocol"][key]
    write_sealed_json(path, metrics)
    assert two("compare", "runs/tiny", "runs/other").stderr == ""
    two("eval", "--isc", *REFERENCE, "--run-dir", "runs/other")
    assert metrics_of(two, Path("runs/other"))["protocol"]["metrics"] == ["fid", "isc"]


def test_metrics_of_an_earlier_version_are_to_be_measured_again(two):
    path, metrics = two.folder / "runs/other/metrics.json", metrics_of(two, Path("runs/other"))
    del metrics["fidelity"]["per_seed"]
    write_sealed_json(path, metrics)
    result = two("compare", "runs/tiny", "runs/other", ok=False)
    assert result.exit_code == 4
    assert 'repeat "qncd eval --run-dir runs/other"' in result.stderr


def test_compare_shows_single_samples(two):
    data = two("compare", "runs/tiny", "runs/other", "--json").data
    for row in data["rows"][1:]:
        assert row["psnr_q05_db"] <= row["psnr_median_db"]
        assert isinstance(row["changed"], int)
    assert "median" in two("compare", "runs/tiny", "runs/other").stdout
