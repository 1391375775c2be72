"""eval, run and ablate of a model that is none of the packaged ones: what always comes, what is
left out with a line, and what is refused because its number would mean nothing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Qncd, packaged, rewrite_latents, tiny_config
from PIL import Image

from qncd_cli.metrics.domains import DOMAINS, EMOJI
from qncd_cli.metrics.features import SmallClassifier

RUN = Path("runs/tiny")
DISTANCES = ("feature_distance", "fid", "kid", "inception_score", "precision", "class_agreement")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """A machine without Inception's weights and without a network."""

    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    runner = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    save_images(runner.folder / "reference")
    return runner


def save_images(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(40 * i, 256, (16, 16), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


def one_line(result, code: int) -> str:
    """The only line on stderr, but for remarks and progress (of a slow machine)."""
    assert result.exit_code == code, (result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    lines = [line for line in lines if " are few for the " not in line]  # checks of small sets
    beside = re.compile(r"backend |eval|samp|(?!Error)[\w ()']+: \d+ ")
    (line,) = [line for line in lines if line and not beside.match(line)]
    assert "Traceback" not in line
    return line


def metrics_of(runner: Qncd) -> dict:
    return json.loads((runner.folder / RUN / "metrics.json").read_text())


def check_fidelity(metrics: dict, count: int = 6) -> None:
    fidelity = metrics["fidelity"]
    for key in ("psnr_db", "psnr_median_db", "sqnr_latents_db", "sqnr_median_db"):
        assert 0 < fidelity[key] < 100
    assert len(fidelity["sqnr_steps_db"]) == 4
    assert len(fidelity["per_seed"]["psnr_db"]) == count
    assert metrics["bytes"]["full"] > metrics["bytes"]["quantized"] > 0
    assert metrics["protocol"]["num_samples"] == count


# ---- what always comes --------------------------------------------------------------------------


def test_without_weights_all_but_distances_comes_and_a_line_names_the_flags(work):
    result = work("eval")
    line = one_line(result, 0)
    assert line.startswith("distances left out: no Inception weights here")
    assert "--inception-weights FILE" in line and "--reference DIR" in line
    metrics = metrics_of(work)
    check_fidelity(metrics)
    assert metrics["fidelity"]["feature_distance"] is None
    for name in ("full", "quantized"):
        assert all(metrics[name].get(key) is None for key in DISTANCES)
    assert metrics["protocol"]["network"] is None
    report = (work.folder / RUN / "report.html").read_text()
    assert "PSNR, median" in report and "distance to full" not in report
    assert "PSNR" in result.stdout and "distance to full" not in result.stdout
    table = work("compare", str(RUN), "--json").data["rows"]
    assert [row["feature_distance_to_full"] for row in table] == [None, None]


def test_run_ends_well_without_weights(qncd):
    data = qncd("run", "--config", "tiny.yaml", "--num", "3", "--json").data
    check_fidelity(data, 3)


def test_one_image_is_enough_for_fidelity(work):
    work("sample", "--num", "1", "--name", "one")
    check_fidelity(work("eval", "--name", "one", "--json").data, 1)


def test_a_table_of_variants_needs_no_weights_either(qncd):
    row = ("--presets", "minmax", "--num", "3")
    result = qncd("ablate", "--config", "tiny.yaml", *row, "--json")
    (found,) = result.data["rows"]
    assert found["feature_distance_to_full"] is found["feature_distance_to_reference"] is None
    assert found["psnr_median_db"] > 0
    assert "--inception-weights FILE" in one_line(result, 0)
    assert qncd("ablate", "--config", "tiny.yaml", *row).stdout.count("minmax") >= 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--fid"], "--fid"),
        (["--kid", "--isc"], "--isc, --kid"),
        (["--network", "inception"], "--network inception"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_is_asked_for_by_name_ends_with_6_and_all_else_is_written(work, options, named):
    line = one_line(work("eval", *options, "--reference", "reference", ok=False), 6)
    assert line.startswith(f"Error: {named}: cannot be measured, all else is written")
    assert "cannot be downloaded" in line and "--inception-weights FILE" in line
    check_fidelity(metrics_of(work))
    assert (work.folder / RUN / "report.html").is_file()


def test_a_metric_that_the_images_are_too_few_for_is_no_loss_of_the_others(sampled, tmp_path):
    runner = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    save_images(runner.folder / "reference")
    runner("sample", "--num", "3", "--name", "few")
    with as_packaged(runner) as eval_:
        result = eval_("--fid", "--prc", "--name", "few", "--reference", "reference", ok=False)
        line = one_line(result, 6)
        assert "--prc: cannot be measured" in line and "3 images, prc needs 4" in line
        metrics = json.loads((runner.folder / RUN / "metrics_few.json").read_text())
        assert metrics["quantized"]["feature_distance"]["value"] > 0
        assert metrics["quantized"]["precision"] is None


@pytest.mark.parametrize("option", ["--reference", "--inception-weights"])
def test_a_file_that_is_named_and_not_there_is_refused_at_once(qncd, option):
    for command in ("run", "ablate"):
        result = qncd(command, "--config", "tiny.yaml", option, "nowhere.npz", ok=False)
        assert f"{option} nowhere.npz: no such file" in one_line(result, 4)
    assert not (qncd.folder / "runs").exists()


def test_a_configured_reference_that_is_not_there_costs_only_its_distance(qncd, tiny_model):
    """As of published models, whose data nobody has at first."""
    qncd.write_config(tiny_config(tiny_model, evaluation__reference="data/coco.npz"))
    result = qncd("run", "--config", "tiny.yaml", "--num", "3", "--json")
    check_fidelity(result.data, 3)
    assert "evaluation.reference data/coco.npz is not here (--reference" in result.stderr


def test_with_features_alone_the_distance_to_data_is_left_out(work):
    with as_packaged(work) as eval_:
        config = work.folder / RUN / "config.yaml"
        config.write_text(config.read_text().replace("reference: null", "reference: gone.npz"))
        line = one_line(eval_(), 0)
    assert line.startswith("the distance to data left out: evaluation.reference gone.npz")
    assert metrics_of(work)["fidelity"]["feature_distance"]["value"] > 0


# ---- packaged features are of packaged models ---------------------------------------------------


@pytest.mark.parametrize("command", [["eval"], ["run", "--config", "tiny.yaml"], ["ablate"]])
@pytest.mark.parametrize(
    "options",
    [["--network", "fashion"], ["--network", "emoji"], ["--reference", "zoo"]],
    ids=" ".join,
)
def test_packaged_features_do_not_judge_other_models(work, command, options):
    command = [*command, "--config", "tiny.yaml"] if command == ["ablate"] else command
    before = sorted((work.folder / "runs").rglob("*"))
    line = one_line(work(*command, *options, ok=False), 3)
    assert "packaged" in line and ("Fashion-MNIST" in line or "Fluent emoji" in line)
    assert sorted((work.folder / "runs").rglob("*")) == before


def test_nor_does_a_configuration_make_them(qncd, tiny_model):
    qncd.write_config(tiny_config(tiny_model, evaluation__reference="zoo"))
    line = one_line(qncd("run", "--config", "tiny.yaml", "--num", "3", ok=False), 3)
    assert "evaluation.reference: zoo" in line
    assert not (qncd.folder / "runs").exists()


class as_packaged:
    """Within it the run's model is a packaged one; gives the eval command."""

    def __init__(self, runner: Qncd, domain: str = "fashion"):
        self.runner = runner
        self.config = runner.folder / RUN / "config.yaml"
        lines = self.config.read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("  source: ")]
        self.model = Path(line.removeprefix("  source: "))
        self.patch = packaged(self.model, domain)

    def __enter__(self):
        source = self.patch.__enter__()
        self.config.write_text(self.config.read_text().replace(str(self.model), source))
        return lambda *options, **more: self.runner("eval", *options, **more)

    def __exit__(self, *error):
        self.patch.__exit__(*error)


def test_packaged_models_have_the_packaged_reference_by_default(work):
    with as_packaged(work) as eval_:
        data = eval_("--json").data
    assert data["protocol"]["reference"] == "zoo"
    assert data["protocol"]["network"] == "fashion-classifier"
    assert data["quantized"]["feature_distance"]["value"] > 0
    assert data["protocol"]["left_out"] == {}


@pytest.mark.parametrize(("own", "other"), [("fashion", "emoji"), ("emoji", "fashion")])
def test_a_classifier_does_not_judge_packaged_models_of_another_domain(work, own, other):
    with as_packaged(work, own) as eval_:
        line = one_line(eval_("--network", other, ok=False), 3)
    assert f"knows {DOMAINS[other].data} alone, not zoo:{own}-tiny (--network {own}, or" in line


@pytest.fixture
def emoji_stand_in(monkeypatch, tmp_path):
    """A classifier of emoji with random weights, and features of no image for its reference."""
    torch.manual_seed(0)
    weights, reference = tmp_path / "classifier.safetensors", tmp_path / "reference.safetensors"
    safetensors.torch.save_file(SmallClassifier(3, 12, stride=2).half().state_dict(), weights)
    rows = torch.rand(200, 128)
    statistics = {"mu": rows.double().mean(0), "sigma": torch.cov(rows.double().T)}
    safetensors.torch.save_file({"features": rows.half(), **statistics}, reference)
    stand_in = replace(EMOJI, weights=weights, reference=reference)
    monkeypatch.setitem(DOMAINS, "emoji", stand_in)


def test_a_packaged_model_of_emoji_is_judged_by_their_classifier_and_statistics(
    work, emoji_stand_in
):
    with as_packaged(work, "emoji") as eval_:
        data = eval_("--json").data
        assert eval_("--network", "emoji", "--json").data["protocol"] == data["protocol"]
    assert data["protocol"]["reference"] == "zoo"
    assert data["protocol"]["network"] == "emoji-classifier"
    assert data["protocol"]["left_out"] == {}
    assert data["quantized"]["feature_distance"]["name"] == "fd_emoji"
    assert data["fidelity"]["feature_distance"]["name"] == "fd_emoji"
    assert 0 <= data["quantized"]["class_agreement"] <= 1


@pytest.mark.parametrize("classes", [[1, 7, 207], [-1, 0, 5], list(range(10, 16))])
def test_labels_that_no_network_knows_are_not_judged(work, classes):
    path = work.folder / RUN / "samples/quantized/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["classes"] = (classes * 6)[:6]
    path.write_text(json.dumps(manifest))
    rewrite_latents(path.parent, classes=torch.tensor(manifest["classes"]))
    with as_packaged(work) as eval_:
        data = eval_("--json").data
    assert data["quantized"].get("class_agreement") is None
    assert 0 <= data["full"]["class_agreement"] <= 1


# ---- images of no model -------------------------------------------------------------------------


def test_images_of_an_npz_are_measured(work):
    paths = sorted((work.folder / "reference").glob("*.png"))
    pixels = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths])
    np.savez(work.folder / "mine.npz", pixels)
    np.savez(work.folder / "grey.npz", pixels[..., :1])
    np.savez(work.folder / "none.npz", labels=np.zeros(3))
    measure = ("--network", "fashion", "--reference", "zoo", "--json")
    found = [
        work("eval", "--images", name, *measure).data["images"]["feature_distance"]["value"]
        for name in ("mine.npz", "grey.npz", "reference")
    ]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)
    line = one_line(work("eval", "--images", "none.npz", *measure[:-1], ok=False), 4)
    assert "none.npz" in line
    assert "no such file" in one_line(work("eval", "--images", "gone.npz", *measure, ok=False), 4)
    np.savez(work.folder / "one.npz", pixels[:1])
    line = one_line(work("eval", "--images", "one.npz", *measure, ok=False), 4)
    assert "nothing can be measured: 1 images, fid needs 2" in line


def test_images_are_measured_in_the_domain_that_is_named(work, emoji_stand_in):
    measure = ("eval", "--images", "reference", "--reference", "zoo")
    found = work(*measure, "--network", "emoji", "--json").data
    assert found["images"]["feature_distance"]["name"] == "fd_emoji"
    line = one_line(work(*measure, ok=False), 3)
    assert "--reference zoo is Fashion-MNIST and Fluent emoji" in line
    assert line.endswith("(say which one: --network fashion or --network emoji)")


def test_images_need_features_and_a_reference(work):
    assert "--reference" in one_line(work("eval", "--images", "reference", ok=False), 3)
    measure = ("--images", "reference", "--reference", "reference")
    assert "--inception-weights FILE" in one_line(work("eval", *measure, ok=False), 6)
