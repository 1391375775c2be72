"""Weight bits by sensitivity: the allocation against brute force, the stage on a tiny model."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Qncd, tiny_config
from torch import Tensor

from qncd_cli.config.loading import parse_config
from qncd_cli.config.schema import Config
from qncd_cli.errors import ConfigError
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.progress import no_progress
from qncd_cli.ptq import bit_budget
from qncd_cli.ptq.bit_budget import WIDTHS, allocate, tried_rows
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer_plan import has_own_weight_bits, plan_layers
from qncd_cli.ptq.smoothing_choice import factors_of
from qncd_cli.quant.rounding import round_nearest
from qncd_cli.runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser
from qncd_cli.spec import weight_spec
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import Artifact

RUN = Path("runs/tiny")
FIXED = {"*transformer_blocks*": {"weights": {"bits": 4}}}  # fewer layers to measure
FEW = {"*": {"weights": {"bits": 4}}, "mid_block.resnets.*": {}, "conv_out": {}}

# ---- the allocation -----------------------------------------------------------------------------


def cost(sizes: list[int], bits: tuple[int, ...] | list[int]) -> int:
    return sum(n * (b - WIDTHS[0]) for n, b in zip(sizes, bits, strict=True))


def total(errors: list[dict[int, float]], bits: tuple[int, ...] | list[int]) -> float:
    return sum(e[b] for e, b in zip(errors, bits, strict=True))


def random_instance(seed: int, layers: int = 5) -> tuple[list[int], list[dict[int, float]]]:
    """Sizes with a common divisor or without, errors that mostly fall with the width."""
    draw = random.Random(seed)
    divisor = draw.choice([1, 16])
    sizes = [divisor * draw.randint(1, 40) for _ in range(layers)]
    errors = [{b: draw.random() * 4.0 ** -(b + draw.randint(-2, 2)) for b in WIDTHS} for _ in sizes]
    return sizes, errors


@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_is_the_best_of_all(seed):
    sizes, errors = random_instance(seed)
    spare = random.Random(seed).randint(0, cost(sizes, [WIDTHS[-1]] * len(sizes)))
    every = itertools.product(WIDTHS, repeat=len(sizes))
    least = min(total(errors, bits) for bits in every if cost(sizes, bits) <= spare)
    found = allocate(sizes, errors, spare)
    assert cost(sizes, found) <= spare
    assert total(errors, found) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_coarse_unit_keeps_the_limit_and_wastes_little(seed, monkeypatch):
    sizes, errors = random_instance(seed, layers=40)
    spare = cost(sizes, [WIDTHS[-1]] * len(sizes)) // 3
    exact = allocate(sizes, errors, spare)
    monkeypatch.setattr(bit_budget, "MAX_UNITS", 300)
    unit = -(-spare // 300)
    found = allocate(sizes, errors, spare)
    assert cost(sizes, found) <= spare
    assert total(errors, found) >= total(errors, exact)
    with_less = allocate(sizes, errors, spare - unit * len(sizes))
    assert total(errors, found) <= total(errors, with_less)


def test_nothing_to_spare_means_the_narrowest_width_everywhere():
    sizes, errors = random_instance(0)
    assert allocate(sizes, errors, 0) == [2] * len(sizes)


def test_more_than_enough_means_each_layer_at_its_best():
    sizes, errors = random_instance(1)
    assert allocate(sizes, errors, 10**9) == [min(e, key=lambda b: e[b]) for e in errors]


def test_bits_go_where_they_help():
    falling = {2: 1.0, 3: 0.25, 4: 0.06, 6: 0.004, 8: 0.0002}
    small = {b: e / 1000 for b, e in falling.items()}
    assert allocate([100, 100], [falling, small], 400) == [6, 2]


# ---- the rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "per_step"), [(1, 6), (4, 6), (20, 1), (32, 1), (50, 1)])
def test_tried_rows_cover_the_timesteps_alike(steps, per_step):
    times = torch.arange(steps, 0, -1).float()
    timestep = torch.cat([times.repeat_interleave(3), times.repeat_interleave(3)])
    rows = tried_rows(timestep)
    assert len(set(rows.tolist())) == len(rows)
    seen = timestep[rows].tolist()
    assert {seen.count(t) for t in seen} == {per_step}
    assert len(set(seen)) == min(steps, 32)
    assert {max(seen), min(seen)} == {float(steps), 1.0}


# ---- the stage ----------------------------------------------------------------------------------


@dataclass
class Calibrated:
    folder: Path
    model: DiffusionModel
    calibration: Artifact
    smoothing: Artifact

    def config(self, **changes) -> Config:
        common = {
            "calibration__batch_size": 12,
            "calibration__noise_trajectories": 1,
            "quantization__weights__rounding": "nearest",
            "quantization__overrides": FIXED,
        }
        return parse_config(tiny_config(self.folder, **{**common, **changes}), "test")

    def quantized(self, **changes) -> quantize.QuantizeResult:
        return quantize.run(self.config(**changes), self.model, self.calibration, self.smoothing)

    def error(self, artifact: Artifact) -> float:
        """Relative squared error of the conditional prediction over all calibration rows."""
        full = self.predictions(full_denoiser(self.model))
        quantized = quantized_denoiser(self.model, artifact, "simulate", True)
        return float((self.predictions(quantized) - full).square().sum() / full.square().sum())

    def predictions(self, denoiser: Denoiser) -> Tensor:
        rows = self.calibration.tensors
        timestep = rows["inputs.timestep"]
        parts = []
        for t in sorted(set(timestep.tolist())):
            at = timestep == t
            condition = self.model.condition(rows["inputs.class"][at])
            parts.append(denoiser(rows["inputs.x"][at], t, condition))
        return torch.cat(parts)


@pytest.fixture(scope="module")
def calibrated(tiny_model) -> Calibrated:
    config = parse_config(tiny_config(tiny_model), "test")
    model = load_model(config.model.source)
    return Calibrated(tiny_model, model, *calibrate.run(config, model))


@pytest.fixture(scope="module")
def at_4_5(calibrated) -> quantize.QuantizeResult:
    return calibrated.quantized(quantization__weights__budget=4.5)


def layer_bits(artifact: Artifact) -> dict[str, int]:
    return {name: entry["weight_bits"] for name, entry in artifact.body["layers"].items()}


def average(artifact: Artifact) -> float:
    entries = artifact.body["layers"].values()
    sizes = [torch.Size(entry["weight_shape"]).numel() for entry in entries]
    bits = [entry["weight_bits"] for entry in entries]
    return sum(n * b for n, b in zip(sizes, bits, strict=True)) / sum(sizes)


def test_the_average_is_within_the_budget_and_close_to_it(at_4_5):
    assert 4.4 < average(at_4_5.quantized) <= 4.5
    assert at_4_5.coverage["average_weight_bits"] == pytest.approx(average(at_4_5.quantized))
    assert len(set(layer_bits(at_4_5.quantized).values())) > 2


def test_coverage_shows_the_bits_of_every_layer(at_4_5):
    bits = layer_bits(at_4_5.quantized)
    shown = {r["name"]: r["weight_bits"] for r in at_4_5.coverage["layers"] if r["name"] in bits}
    assert shown == bits


def test_outer_layers_and_overrides_keep_their_bits(calibrated):
    fixed = {
        "*_blocks.*": {"weights": {"bits": 3}},
        "mid_block.resnets.*": {"activations": {"bits": 6}},  # leaves the weights open
    }
    result = calibrated.quantized(
        quantization__weights__budget=3.2, quantization__overrides=fixed
    ).quantized
    free = set()
    for name, entry in result.body["layers"].items():
        if name in ("conv_in", "conv_out"):
            assert entry["weight_bits"] == 8
        elif "_blocks." in name and not name.startswith("mid_block.resnets."):
            assert entry["weight_bits"] == 3
        if "sensitivity" in entry:
            assert set(entry["sensitivity"]) == {str(b) for b in WIDTHS}
            free.add(name)
    assert {"mid_block.resnets.0.conv1", "mid_block.resnets.1.conv2"} <= free
    assert all(name.startswith("mid_block.") for name in free)
    assert average(result) <= 3.2


def test_less_error_than_4_bits_everywhere(calibrated, at_4_5):
    uniform = calibrated.quantized().quantized
    assert average(uniform) < 4.5
    assert calibrated.error(at_4_5.quantized) < 0.9 * calibrated.error(uniform)


def test_less_error_than_4_bits_everywhere_at_the_same_size(calibrated, at_4_5):
    uniform = calibrated.quantized(quantization__activations__bits=32).quantized
    entries = {n: e for n, e in at_4_5.quantized.body["layers"].items() if "sensitivity" in e}
    sizes = [torch.Size(e["weight_shape"]).numel() for e in entries.values()]
    errors = [{int(b): v for b, v in e["sensitivity"].items()} for e in entries.values()]
    chosen = zip(entries, allocate(sizes, errors, 2 * sum(sizes)), strict=True)
    overrides = FIXED | {name: {"weights": {"bits": bits}} for name, bits in chosen}
    same = calibrated.quantized(
        quantization__activations__bits=32, quantization__overrides=overrides
    ).quantized
    assert average(same) <= average(uniform)
    assert calibrated.error(same) < calibrated.error(uniform)


def test_the_same_inputs_give_the_same_artifact(calibrated):
    changes = {"quantization__weights__budget": 4.1, "quantization__overrides": FEW}
    first, again = (calibrated.quantized(**changes).quantized for _ in range(2))
    assert first.digest == again.digest


def test_sensitivity_is_the_error_of_the_whole_denoiser(calibrated):
    """Against a copy of the model in which the layer's weight is really replaced."""
    name = "down_blocks.1.resnets.0.conv2"
    config = calibrated.config()
    (plan,) = [p for p in plan_layers(config, calibrated.model.denoiser) if p.name == name]
    smoothing = factors_of(calibrated.smoothing)[name]
    job = QuantizationJob(
        config, calibrated.model, calibrated.calibration, [plan], {name: smoothing}
    )
    found = bit_budget.measure_sensitivity(job, no_progress)[name]
    full = calibrated.predictions(full_denoiser(calibrated.model)).double().flatten(1)
    exact, scale = plan.layer.weight.data.clone(), smoothing.factor.reshape(1, -1, 1, 1)
    for bits in (2, 4):
        spec = weight_spec(bits)
        codes, (step, zero), _ = round_nearest(exact * scale, spec)
        rounded = (codes - zero.reshape(-1, 1, 1, 1)) * step.reshape(-1, 1, 1, 1)
        plan.layer.weight.data = rounded / scale
        changed = calibrated.predictions(full_denoiser(calibrated.model)).double().flatten(1)
        plan.layer.weight.data = exact
        error = ((changed - full).square().sum(1) / full.square().sum(1)).mean()
        assert found[bits] == pytest.approx(float(error), rel=1e-3)
    assert found[2] > found[4] > found[8] > 0


def test_measuring_leaves_the_model_as_it_was(calibrated, at_4_5):
    fresh = load_model(str(calibrated.folder))
    now = calibrated.model.denoiser.state_dict()
    assert all(torch.equal(now[k], v) for k, v in fresh.denoiser.state_dict().items())


def test_a_budget_below_the_possible_names_the_possible_range(calibrated):
    few = {"quantization__overrides": {**FEW, "mid_block.*": {}}}
    config = calibrated.config(**few)
    plans = plan_layers(config, calibrated.model.denoiser)
    sizes = [p.layer.weight.numel() for p in plans]
    least = [p.weight_bits if has_own_weight_bits(p, config) else 2 for p in plans]
    low = sum(n * b for n, b in zip(sizes, least, strict=True)) / sum(sizes)
    with pytest.raises(ConfigError, match="possible here: [0-9.]+ to [0-9.]+;") as caught:
        calibrated.quantized(quantization__weights__budget=2.0, **few)
    named = float(str(caught.value).partition("possible here: ")[2].partition(" ")[0])
    assert low <= named < low + 0.01
    possible = calibrated.quantized(quantization__weights__budget=named, **few).quantized
    assert average(possible) <= named


def test_a_budget_with_nothing_to_choose_is_an_error(calibrated):
    fixed = {"*": {"weights": {"bits": 4}}}
    with pytest.raises(ConfigError, match="no layer's weight bits are open to choice"):
        calibrated.quantized(quantization__weights__budget=5.0, quantization__overrides=fixed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"budget": 8.5}, "budget takes 2 to 8 bits on average, got 8.5"),
        ({"budget": 1}, "budget takes 2 to 8 bits on average, got 1"),
        ({"budget": 4.5, "bits": 32}, "budget needs quantized weights"),
    ],
)
def test_an_impossible_budget_is_refused_while_reading(weights, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(tiny_config(Path("m"), quantization={"weights": weights}), "test")


# ---- the command --------------------------------------------------------------------------------


def test_the_command_takes_a_budget(sampled, tmp_path):
    qncd = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    uniform = artifacts.read(qncd.folder / RUN / "quantized.safetensors").digest
    few = f"quantization.overrides={json.dumps(FEW)}"
    data = qncd("quantize", "--budget", "4.1", "--set", few, "--json").data
    assert 4.0 < data["average_weight_bits"] <= 4.1
    coverage = json.loads((qncd.folder / RUN / "coverage.json").read_text())
    assert coverage["average_weight_bits"] == data["average_weight_bits"]
    mixed = artifacts.read(qncd.folder / RUN / "quantized.safetensors")
    assert mixed.digest != uniform
    codes = sum(t.numel() for k, t in mixed.tensors.items() if k.endswith(".weight"))
    assert codes == coverage["weight_code_bytes"]
    assert qncd("quantize", "--json").data["skipped"]  # the budget is part of the run now
    qncd("sample", "--num", "2", "--name", "mixed")
    result = qncd("quantize", "--budget", "9", ok=False)
    assert result.exit_code == 3
    assert "budget takes 2 to 8 bits on average, got 9" in result.stderr
    result = qncd("quantize", "--set", "quantization.weights.budget=2", ok=False)
    assert result.exit_code == 3
    told, *_, error = result.stderr.strip().splitlines()  # progress between them, if it is slow
    assert told.startswith("quantize: again") and error.startswith("Error: ")
    assert "possible here: " in result.stderr
