"""Hessians are kept while the layers that need them are rounded, and not collected again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.loading import parse_config
from qncd_cli.models.loading import load_model
from qncd_cli.ptq import hessians
from qncd_cli.ptq.hessians import SUMS, collect_hessians, with_hessians
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer import quantize_layer
from qncd_cli.ptq.layer_plan import plan_layers
from qncd_cli.quant.smoothing import IDENTITY
from qncd_cli.stages import calibrate
from qncd_cli.store import partial
from qncd_cli.store.partial import Partial, Piece


class _Killed(Exception):
    pass


@pytest.fixture(scope="module", params=[1, 3])
def job(tiny_model, request) -> QuantizationJob:
    weights = {"bits": 4, "rounding": "gptq", "passes": request.param}
    tree = tiny_config(tiny_model, quantization__weights=weights, correction__intra="none")
    config = parse_config(tree, "test")
    model = load_model(config.model.source)
    calibration, _ = calibrate.run(config, model)
    return QuantizationJob(config, model, calibration, plan_layers(config, model.denoiser), {})


def kept_in(folder) -> Partial:
    return Partial(folder / "partial" / "quantize", {"model": "m"}, pytest.fail)


def ranges(job):
    return dict.fromkeys((plan.name for plan in job.plans), None)


def counted(calls: list[int], most: float = float("inf")):
    """A Track that counts calls of the denoiser, and ends the process before one too many."""

    def track(items, what, total, unit):
        for item in items:
            if len(calls) >= most:
                raise _Killed
            yield item
            calls.append(1)

    return track


def test_a_killed_collection_goes_on_with_the_call_behind_the_last(job, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "EVERY", 0.0)
    monkeypatch.setattr(partial, "SHARE", 1e9)
    calls: list[int] = []
    expected = collect_hessians(job, ranges(job), counted(calls))
    for _ in range(2):
        with pytest.raises(_Killed), kept_in(tmp_path) as kept:
            collect_hessians(replace(job, partial=kept), ranges(job), counted([], most=1))
    made: list[int] = []
    with kept_in(tmp_path) as kept:
        found = collect_hessians(replace(job, partial=kept), ranges(job), counted(made))
    assert len(made) == len(calls) - 2
    assert found.keys() == expected.keys()
    for name, curvature in found.items():
        assert torch.equal(curvature.hessian, expected[name].hessian)


def test_layers_that_are_left_of_a_killed_group_find_their_hessians(job, tmp_path, monkeypatch):
    """In groups of a few layers; Hessians are there as long as the group is at work, no longer."""
    monkeypatch.setattr(hessians, "HESSIAN_MEMORY", 1 << 20)
    calls: list[int] = []
    expected = {}
    rounded: dict[str, Piece] = {}

    def rounded_all(job, rounded, track, most=float("inf")) -> None:
        groups = with_hessians(job, ranges(job), rounded, track)
        layers = ((plan, held.pop(plan.name)) for plans, held in groups for plan in plans)
        for number, (plan, curvature) in enumerate(layers):
            if number >= most:
                raise _Killed
            if plan.name in expected:
                assert torch.equal(curvature.hessian, expected[plan.name])
            expected.setdefault(plan.name, curvature.hessian)
            tensors, entry = quantize_layer(plan, None, IDENTITY, curvature)
            rounded[plan.name] = Piece(entry.to_body(), tensors)
            job.partial.keep(plan.name, rounded[plan.name])
            files = [p.name for p in (tmp_path / "partial" / "quantize").glob("*")]
            assert (f"{SUMS}.safetensors" in files) == (job.partial.folder is not None)

    rounded_all(job, rounded, counted(calls))
    again: dict[str, Piece] = {}
    made: list[int] = []
    for most in (1, 2, 7):
        with pytest.raises(_Killed), kept_in(tmp_path) as kept:
            rounded_all(replace(job, partial=kept), again, counted(made), most)
    with kept_in(tmp_path) as kept:
        rounded_all(replace(job, partial=kept), again, counted(made))
        assert not (tmp_path / "partial" / "quantize" / f"{SUMS}.safetensors").exists()
    assert again.keys() == rounded.keys()
    assert len(made) == len(calls)


def test_a_call_ends_where_the_last_of_its_layers_has_had_its_input(job):
    ran = []
    handles = [
        plan.layer.register_forward_hook(lambda *_, name=plan.name: ran.append(name))
        for plan in job.plans
    ]
    names = [plan.name for plan in job.plans]
    try:
        some = collect_hessians(job.planned(job.plans[:3]), ranges(job))
        early, ran[:] = list(ran), []
        every = collect_hessians(job, ranges(job))
    finally:
        for handle in handles:
            handle.remove()
    assert set(early) == set(names[:2]) < set(ran)
    for name, curvature in some.items():
        assert torch.equal(curvature.hessian, every[name].hessian)
