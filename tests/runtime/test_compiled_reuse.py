"""Graphs of a denoiser that leaves work out compute what its layers do."""

from __future__ import annotations

import pytest
import torch
from conftest import SHALLOW, save_tiny_pipeline, tiny_config

from qncd_cli.backends import int8
from qncd_cli.backends.compiled import graph
from qncd_cli.config.loading import parse_config
from qncd_cli.errors import BackendUnavailable
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.loading import load_model
from qncd_cli.runtime.compiled_reuse import compile_reusing, has_graphs
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.runtime.reuse import Pattern, ReusingDenoiser, SiteTerms
from qncd_cli.stages import calibrate, quantize

DIGESTS = {"quantized": "a", "model": "b"}
SITE = "up_blocks.0.resnets.1"
TIMES = (900.0, 500.0, 100.0)
KEPT = (frozenset[str](), frozenset({SITE}), frozenset({SITE}))

why = int8.why_unavailable(torch.device("cpu")) or graph.why_unavailable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why), reason=why),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model and quantized artifact."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_pipeline(folder, **SHALLOW)
    model = load_model(str(folder))
    tree = tiny_config(
        folder,
        sampling__steps=3,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 8, "rounding": "nearest"},
        quantization__activations={"bits": 8, "observer": "minmax"},
    )
    config = parse_config(tree, "test")
    return model, quantize.run(config, model, *calibrate.run(config, model)).quantized


def reusing(made) -> ReusingDenoiser:
    terms = SiteTerms(torch.full((2, 16), 0.1), torch.full((2, 16), 0.2), torch.zeros(2, 16))
    inner = quantized_denoiser(*made, "int8", True)
    return ReusingDenoiser(inner, Pattern(TIMES, KEPT), [{}, {SITE: terms}, {SITE: terms}])


def rows_of(model, count):
    draws = [torch.Generator().manual_seed(seed) for seed in range(count)]
    x = torch.cat([torch.randn(1, *model.latent_shape, generator=draw) for draw in draws])
    with torch.no_grad():
        return x, model.condition(model.labels(list(range(count)), "all"))


def drawn(denoiser, model, count):
    x, condition = rows_of(model, count)
    return torch.stack([denoiser(x * (1 + t / 900), t, condition) for t in TIMES])


def compiled(made, folder, said):
    return compile_reusing(reusing(made), DIGESTS, rows_of(made[0], 4), folder, said.append)


@pytest.fixture(scope="module")
def folder(made, operators, tmp_path_factory):
    """Holds both graphs. Do not change."""
    folder, said = tmp_path_factory.mktemp("graphs"), []
    compiled(made, folder, said)
    assert [line[:26] for line in said] == [
        "compiling graph 1 of 2 of ",
        "compiling graph 2 of 2 of ",
    ]
    return folder


@pytest.mark.parametrize("count", [2, 8, 70])
def test_graphs_compute_what_the_layers_do(made, folder, count):
    said = []
    denoiser = compiled(made, folder, said)
    assert said == [] and has_graphs(folder, DIGESTS, denoiser.pattern)
    expected, found = drawn(reusing(made), made[0], count), drawn(denoiser, made[0], count)
    for step in range(len(TIMES)):
        assert sqnr_db(expected[step], found[step]) > 35
    whole = ReusingDenoiser(
        quantized_denoiser(*made, "int8", True), Pattern(TIMES, (frozenset(),) * 3)
    )
    left_out = drawn(whole, made[0], count)
    assert sqnr_db(expected[1], left_out[1]) < 30  # reuse is another prediction, in both


def test_a_row_does_not_depend_on_its_batch(made, folder):
    denoiser = compiled(made, folder, [])
    whole = drawn(denoiser, made[0], 70)
    for rows in (2, 64):  # two branches of guidance in each
        x, condition = rows_of(made[0], 70)
        picked = [*range(rows // 2), *range(35, 35 + rows // 2)]
        own = {name: value[picked] for name, value in condition.items()}
        some = torch.stack([denoiser(x[picked] * (1 + t / 900), t, own) for t in TIMES])
        assert torch.equal(some, whole[:, picked])


def test_a_plan_of_too_many_patterns_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr("qncd_cli.runtime.compiled_reuse.MOST_GRAPHS", 1)
    with pytest.raises(BackendUnavailable, match="keeps 2 different sets of sites"):
        compiled(made, tmp_path, [])
