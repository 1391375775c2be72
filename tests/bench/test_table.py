"""The bench on tiny models: what it measures, in which order, and what it says of missing rows."""

from __future__ import annotations

import statistics

import pytest
import torch
from conftest import save_tiny_dit_pipeline
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qncd_cli.backends import int8
from qncd_cli.backends.roofline import microbenchmarks
from qncd_cli.bench import table
from qncd_cli.bench.profile import KINDS, profile_calls
from qncd_cli.bench.row import FACTS, Alone, Inputs, measure_alone, parse_rows
from qncd_cli.bench.timing import spread
from qncd_cli.config.loading import parse_config
from qncd_cli.errors import BackendUnavailable, ConfigError
from qncd_cli.models.denoiser_folder import load_denoiser, save_denoiser
from qncd_cli.models.loading import load_model

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(
    bool(int8.why_unavailable(CPU)), reason="this CPU has no integer kernels"
)
FLOATS = ("float32-eager", "bfloat16-eager")
GRAPH = () if int8.why_unavailable(CPU) else ("int8-w4a8", "int8-w4a8-compiled")


def benched(folder, rows, **options):
    config = parse_config({"model": {"source": str(folder)}}, "test")
    request = {"batch_size": 2, "rounds": 3, "alone": False, **options}
    model = load_model(str(folder))
    return table.run(config, model, table.BenchRequest(parse_rows(rows), **request), lambda _: None)


@pytest.fixture(scope="module")
def report(tiny_model):
    """Do not change."""
    return benched(tiny_model, (*FLOATS, "simulate-w4a8", "simulate-w8a8"))


def by_name(report):
    return {row["name"]: row for row in report["rows"]}


# ---- what is measured ---------------------------------------------------------------------------


def test_speedup_is_the_quotient_of_the_medians(report):
    rows = by_name(report)
    assert list(rows) == [*FLOATS, "simulate-w4a8", "simulate-w8a8"]
    for row in rows.values():
        assert len(row["seconds"]) == report["rounds"] == 3
        assert row["seconds_per_call"] == statistics.median(row["seconds"])
        whole = rows["float32-eager"]["seconds_per_call"]
        assert row["speedup"] == whole / row["seconds_per_call"]
    assert rows["float32-eager"]["speedup"] == 1


def test_roofline_is_the_rate_over_the_best_one_of_its_arithmetic(report):
    assert report["rates"].keys() == {"float32", "bfloat16"}
    for row in report["rows"]:
        operations = 2 * report["macs"] * report["batch_size"]
        best = report["rates"][row["arithmetic"]]
        assert row["roofline"] == pytest.approx(operations / row["seconds_per_call"] / best)
    assert by_name(report)["simulate-w4a8"]["arithmetic"] == "float32"


def test_disk_bytes_are_those_of_the_files(report, tiny_model, tmp_path):
    rows = by_name(report)
    model = load_model(str(tiny_model))
    save_denoiser(model.denoiser, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    full = rows["float32-eager"]["disk_bytes"]
    assert full == model.denoiser_bytes()
    assert full <= file.stat().st_size < full + 100_000  # the names of its tensors
    assert rows["bfloat16-eager"]["disk_bytes"] == full // 2
    four, eight = (rows[f"simulate-w{bits}a8"]["disk_bytes"] for bits in (4, 8))
    assert four < eight < full
    body = sum(p.numel() for n, p in model.denoiser.named_parameters() if "time_emb" in n)
    assert four > 4 * body  # what the artifact leaves out has to be on disk too


def test_what_was_not_asked_for_is_none(report):
    assert report["profile"] is None
    assert report["unavailable"] == {}
    for row in report["rows"]:
        assert [row[name] for name in FACTS] == [None] * len(FACTS)


def test_without_the_baseline_there_is_no_speedup(tiny_model):
    (row,) = benched(tiny_model, ["bfloat16-eager"], rounds=1)["rows"]
    assert row["speedup"] is None
    assert row["spread"] == 0


def test_spread_is_between_the_quartiles():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == 2.0
    assert spread([7.0]) == 0.0


# ---- the order of the calls ---------------------------------------------------------------------


def test_rows_are_timed_in_turn(tiny_model):
    """Seen by a hook on every denoiser: the last calls are whole rounds in the rows' order."""
    called: list[int] = []

    def hook(module: nn.Module, args: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            called.append(id(module))

    handle = register_module_forward_pre_hook(hook)
    try:
        benched(tiny_model, (*FLOATS, "simulate-w4a8"), rounds=4)
    finally:
        handle.remove()
    last = called[-12:]
    assert len(set(last[:3])) == 3
    assert last == last[:3] * 4
    assert called[-18:-12] == [m for m in last[:3] for _ in range(table.WARM_UP)]


# ---- rows that cannot be measured ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("float32-eagre", "did you mean float32-eager?"),
        ("bfloat16", "did you mean bfloat16-eager?"),
        ("int8-w4a9", "did you mean int8-w4a8?"),
        ("tensorrt", "known: float32-eager"),
    ],
)
def test_an_unknown_row_names_the_nearest(name, hint):
    with pytest.raises(ConfigError) as caught:
        parse_rows(["float32-eager", name])
    assert f"--rows {name}: unknown row" in str(caught.value)
    assert hint in str(caught.value)


def test_a_quantized_row_may_name_the_type_of_what_stays_unquantized():
    names = ("int8-w4a8", "int8-w4a8-bfloat16", "int8-w4a8-bfloat16-compiled", "simulate-w4a6")
    rows = parse_rows(names, dtype="float16")
    assert [row.dtype for row in rows] == ["float16", "bfloat16", "bfloat16", "float16"]
    assert [row.compiled for row in rows] == [False, False, True, False]
    assert [row.arithmetic for row in rows] == ["int8", "int8", "int8", "float32"]


def test_a_missing_backend_or_compiler_is_a_line_and_the_rest_is_measured(tiny_model, monkeypatch):
    monkeypatch.setenv(int8.SWITCH, "1")
    monkeypatch.setenv("CXX", "no-such-compiler")
    names = ("float32-eager", "int8-w4a8", "float32-compiled")
    report = benched(tiny_model, names, rounds=1)
    assert [row["name"] for row in report["rows"]] == ["float32-eager"]
    why = report["unavailable"]
    assert f"{int8.SWITCH}=1" in why["int8-w4a8"]
    assert "no-such-compiler" in why["float32-compiled"]
    with pytest.raises(BackendUnavailable, match=f"int8-w4a8: .*{int8.SWITCH}=1"):
        benched(tiny_model, ["int8-w4a8"])


def test_a_row_that_fails_does_not_take_the_others_along(tiny_model, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("cannot be compiled\n  at length")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setenv("CXX", "sh")  # some program: the row counts as available
    report = benched(tiny_model, ("float32-eager", "bfloat16-compiled"), rounds=1)
    assert [row["name"] for row in report["rows"]] == ["float32-eager"]
    assert report["unavailable"] == {"bfloat16-compiled": "RuntimeError: cannot be compiled"}


# ---- integers -----------------------------------------------------------------------------------


@needs_int8
def test_int8_rows_say_where_their_time_goes(tiny_model):
    report = benched(tiny_model, ("float32-eager", "int8-w4a8"), rounds=1, profile=True)
    assert report["rates"].keys() == {"float32", "int8"}
    profiles = report["profile"]
    assert list(profiles) == ["float32-eager", "int8-w4a8"]
    for found in profiles.values():
        assert tuple(found["shares"]) == KINDS
        assert sum(found["shares"].values()) == pytest.approx(1)
        assert found["seconds_per_call"] > 0
    whole, integer = (found["shares"] for found in profiles.values())
    assert whole["integer kernels"] == whole["quantize and copy"] == 0
    assert whole["float layers"] > 0
    for kind in ("integer kernels", "quantize and copy", "attention products"):
        assert integer[kind] > 0
    assert by_name(report)["int8-w4a8"]["integer_macs_share"] > 0.9


def test_profiling_leaves_no_hooks_and_counts_a_layer_inside_attention_as_a_layer():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(64, 64)

        def forward(self, x):
            return self.to_q(x) @ x.transpose(0, 1)

    module = Attention()
    shares = profile_calls(module, lambda: module(torch.ones(64, 64)))["shares"]
    assert shares["float layers"] > 0
    assert shares["attention products"] > 0
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize(
    "arithmetic", ["float32", "bfloat16", pytest.param("int8", marks=needs_int8)]
)
def test_microbenchmarks_multiply_what_they_say(arithmetic):
    """Of ones: every output is the number of products in it."""
    conv, linear = microbenchmarks(arithmetic)
    out = conv.call().float()
    inner = out[..., 1:-1, 1:-1]
    assert (inner == inner.flatten()[0]).all()
    assert conv.operations == 2 * out.numel() * int(inner.flatten()[0])
    out = linear.call().float()
    assert linear.operations == 2 * out.numel() * int(out.flatten()[0])


# ---- alone --------------------------------------------------------------------------------------


def test_what_a_row_takes_alone(tiny_model, tmp_path):
    model = load_model(str(tiny_model))
    save_denoiser(model.denoiser, tmp_path / "float32")
    inputs = Inputs(torch.zeros(2, 3, 8, 8), 500.0, model.condition(torch.tensor([0, 1])))
    inputs.save(tmp_path / "inputs.pt")
    (row,) = parse_rows(["float32-eager"])
    threads = torch.get_num_threads()
    job = Alone(row, tmp_path / "float32", None, tmp_path / "inputs.pt", tmp_path, True, threads)
    found = measure_alone(job)
    assert tuple(found) == FACTS
    assert found["load_seconds"] > 0
    assert found["prepare_seconds"] >= 0
    (tmp_path / "float32" / "config.json").unlink()
    assert set(measure_alone(job)) == {"why"}


def test_a_denoiser_comes_back_from_disk_in_the_dtype_asked_for(tiny_model, tmp_path):
    denoiser = load_model(str(tiny_model)).denoiser
    save_denoiser(denoiser, tmp_path)
    again = load_denoiser(tmp_path, torch.bfloat16)
    assert type(again) is type(denoiser)
    assert not again.training
    for (name, there), here in zip(again.named_parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(there, here.bfloat16()), name
        assert not there.requires_grad


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiles
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
def test_every_row_in_a_process_of_its_own(tmp_path):
    save_tiny_dit_pipeline(tmp_path / "model", layers=1)  # few layers: each is compiled twice
    names = (FLOATS[0], *(GRAPH or ("float32-compiled",)))
    report = benched(tmp_path / "model", names, rounds=2, alone=True, profile=True)
    assert report["unavailable"] == {}
    rows = by_name(report)
    assert list(rows) == list(names)
    whole = rows["float32-eager"]
    assert whole["peak_bytes"] > whole["disk_bytes"]
    compiled, eager = rows[names[-1]], rows[names[-2]]
    assert compiled["prepare_seconds"] > eager["prepare_seconds"]
    assert compiled["peak_bytes"] > eager["peak_bytes"]  # the compiler's own memory
    for name in GRAPH:
        shares = report["profile"][name]["shares"]
        if name.endswith("-compiled"):
            assert shares["compiled code"] > 0 and shares["rest"] == 0
        assert shares["integer kernels"] > 0
