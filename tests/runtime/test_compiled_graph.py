"""A compiled denoiser computes what the eager one does, and is compiled once."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch
from conftest import save_tiny_pipeline, tiny_config

from qncd_cli.backends import int8
from qncd_cli.backends.compiled import graph, native
from qncd_cli.config.loading import parse_config
from qncd_cli.errors import BackendUnavailable
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.loading import load_model
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime.compiled_graph import compile_denoiser, graph_path, has_graph, made_graph
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store import own_code

CPU = torch.device("cpu")
DIGESTS = {"quantized": "a", "model": "b"}
STEPS = [900.0, 500.0, 100.0]  # one in each timestep group

why = int8.why_unavailable(CPU) or graph.why_unavailable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # whichever test is first waits for the compiler
    pytest.mark.skipif(bool(why), reason=why),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model, quantized artifact: layers of one and of two bytes, a range for every step.

    Two levels, attention in the middle alone: every kind of layer once, which saves compiling.
    """
    folder = tmp_path_factory.mktemp("model") / "tiny"
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    save_tiny_pipeline(folder, **blocks)
    model = load_model(str(folder))
    tree = tiny_config(
        folder,
        sampling__steps=3,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 4, "rounding": "nearest"},
        quantization__activations={"bits": 8, "observer": "minmax", "timestep_groups": 3},
        quantization__first_last_activation_bits=16,
        quantization__bias_correction=True,
    )
    config = parse_config(tree, "test")
    calibration, smoothing = calibrate.run(config, model)
    return model, quantize.run(config, model, calibration, smoothing).quantized


def eager(made):
    return quantized_denoiser(*made, "int8", True)


def rows_of(model, count):
    """x and condition; the same first rows whatever the count."""
    draws = [torch.Generator().manual_seed(seed) for seed in range(count)]
    x = torch.cat([torch.randn(1, *model.latent_shape, generator=draw) for draw in draws])
    with torch.no_grad():
        return x, model.condition(model.labels(list(range(count)), "all"))


@pytest.fixture(scope="module")
def folder(made, operators, tmp_path_factory):
    """Holds the graph for small batches. Do not change."""
    folder, said = tmp_path_factory.mktemp("graphs"), []
    compile_into(folder, made, said)
    assert len(said) == 1 and "compiling" in said[0]
    assert list(folder.iterdir()) == [graph_path(folder, DIGESTS)]
    return folder


def compile_into(folder, made, said, rows=4, digests=DIGESTS):
    return compile_denoiser(eager(made), digests, rows_of(made[0], rows), folder, said.append)


@pytest.mark.parametrize("count", [1, 2, 7, 63, 70])
def test_a_graph_computes_what_the_layers_do_at_every_step_and_batch_size(made, folder, count):
    said = []
    compiled, plain = compile_into(folder, made, said), eager(made)
    assert said == []  # it was there
    x, condition = rows_of(made[0], count)
    for t in STEPS:
        expected = plain(x, t, condition)
        # a code at the border of two may flip, and its step is then an error of this size
        assert sqnr_db(expected, compiled(x, t, condition)) > 40
    assert compiled.calls == plain.calls == len(STEPS)


def test_a_row_does_not_depend_on_its_batch_nor_on_the_number_of_threads(made, folder):
    compiled, threads = compile_into(folder, made, []), torch.get_num_threads()
    x, condition = rows_of(made[0], 9)
    together = compiled(x, STEPS[1], condition)
    first = {name: value[:2] for name, value in condition.items()}
    assert torch.equal(compiled(x[:2], STEPS[1], first), together[:2])
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(compiled(x, STEPS[1], condition), together)
    finally:
        torch.set_num_threads(threads)


def test_tracing_leaves_the_eager_layers_as_they_were(made, folder):
    plain = eager(made)
    x, condition = rows_of(made[0], 2)
    before = plain(x, STEPS[0], condition)
    compile_denoiser(plain, DIGESTS, rows_of(made[0], 2), folder, print)
    layers = [m for m in plain.module.modules() if isinstance(m, QuantizedLayer)]
    assert layers and all(m.compute is int8.compute and m.weight.numel() for m in layers)
    assert torch.equal(plain(x, STEPS[0], condition), before)


def test_other_artifacts_and_models_have_graphs_of_their_own(tmp_path):
    paths = {
        graph_path(tmp_path, digests)
        for digests in (DIGESTS, {**DIGESTS, "quantized": "c"}, {**DIGESTS, "model": "c"})
    }
    assert len(paths) == 3


def test_another_cpu_has_a_graph_of_its_own(tmp_path, monkeypatch):
    """It may lack instructions that this one has."""
    here = graph_path(tmp_path, DIGESTS)
    other = {**native.machine(), "instructions": "flags : fpu"}
    monkeypatch.setattr(native, "machine", lambda: other)
    assert graph_path(tmp_path, DIGESTS) != here


@pytest.mark.parametrize("place", [0, 30, 1000, -1])
def test_a_flipped_bit_in_a_graph_is_found(folder, tmp_path, place):
    path = graph_path(tmp_path, DIGESTS)
    data = bytearray(graph_path(folder, DIGESTS).read_bytes())
    path.write_bytes(data)
    assert has_graph(tmp_path, DIGESTS)
    data[place] ^= 4
    path.write_bytes(data)
    assert not has_graph(tmp_path, DIGESTS)


def test_a_graph_that_the_user_has_not_compiled_is_made_again(made, folder, tmp_path, monkeypatch):
    """As one from a stranger's run directory, and nothing is left beside it."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said, path = [], graph_path(tmp_path, DIGESTS)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (temporary := tmp_path / "data" / "tmp").mkdir(parents=True)  # other tests write into /tmp
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = path.read_bytes()
    compiled = compile_into(tmp_path, made, said)
    assert len(said) == 2 and str(path) in said[0] and "made again" in said[0]
    assert path.read_bytes() != before and has_graph(tmp_path, DIGESTS)
    assert {path.name, "data"} == set(os.listdir(tmp_path))
    left = [name for name in os.listdir(temporary) if not name.startswith("torchinductor_")]
    assert left == []  # besides the compilers' cache
    x, condition = rows_of(made[0], 2)
    assert torch.equal(
        compiled(x, STEPS[0], condition),
        compile_into(tmp_path, made, said)(x, STEPS[0], condition),
    )


def test_a_graph_of_operators_that_are_gone_is_made_again(folder, tmp_path, monkeypatch):
    """As after an update; without a compiler it is refused."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said, load, loads = [], graph.load_graph, iter([True, False, True])
    with own_code.opened(graph_path(tmp_path, DIGESTS)) as library:
        content = library.read_bytes()

    def load_graph(path):
        if next(loads):
            raise RuntimeError("Could not find schema for qncd::gone.\nmore")
        return load(path)

    monkeypatch.setattr(graph, "load_graph", load_graph)
    made_graph(DIGESTS, tmp_path, lambda: content, said.append, "compiling")
    assert len(said) == 2 and said[0].endswith("Could not find schema for qncd::gone.: made again")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailable, match="qncd::gone"):
        made_graph(DIGESTS, tmp_path, lambda: content, said.append, "compiling")


def test_only_a_new_graph_needs_a_compiler(made, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compile_into(folder, made, []).calls == 0
    with pytest.raises(BackendUnavailable, match="no-such-compiler"):
        compile_into(tmp_path, made, [])
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(made, tmp_path, monkeypatch):
    denoiser = eager(made)

    def forward(x, t, **condition):
        return made[0].denoiser(x, t, **condition) if x.sum() > 0 else None

    monkeypatch.setattr(denoiser.module, "forward", forward)
    with pytest.raises(BackendUnavailable, match="cannot be compiled") as refused:
        compile_denoiser(denoiser, DIGESTS, rows_of(made[0], 2), tmp_path, lambda line: None)
    assert "\n" not in refused.value.message
    assert list(tmp_path.glob("*.graph")) == []
