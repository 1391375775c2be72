"""Forecast of time: rates of this machine, and what is computed at each."""

from __future__ import annotations

import time

import pytest
from conftest import Qncd, tiny_config

from qncd_cli.forecast import plan, work
from qncd_cli.forecast.work import EFFICIENCY, Rates
from qncd_cli.ptq.cost import Cost

KNOWN = {"float32": Rates(1e9, 1e9, 1e9), "bfloat16": Rates(1e9, 1e9, 4e9)}


def test_each_kind_of_work_has_its_rate():
    rates = Rates(macs=2.0, elements=5.0, model_macs=8.0)
    costs = [Cost(macs=10), Cost(model_macs=16), Cost(passes=15)]
    assert rates.seconds(costs) == pytest.approx((5 + 2) / EFFICIENCY + 3)


def test_the_models_type_is_measured_where_it_is_not_float32(monkeypatch):
    asked = []
    monkeypatch.setattr(work, "_products", lambda dtype, clock: asked.append(dtype) or 1.0)
    monkeypatch.setattr(work, "RATE_SECONDS", 0.0)
    for dtype in ("float32", "bfloat16", "float16"):
        work.measured_rates(dtype, time.process_time)
    assert asked == ["float32", "float32", "bfloat16", "float32"]


def test_a_plan_in_bfloat16_has_the_same_work_in_less_time(tmp_path, tiny_model, monkeypatch):
    runner = Qncd(tmp_path)
    runner.write_config(tiny_config(tiny_model))
    monkeypatch.setattr(plan, "measured_rates", lambda dtype, clock: KNOWN[dtype])
    ask = ("run", "--config", "tiny.yaml", "--plan", "--json", "--set")
    found = {d: runner(*ask, f"model.dtype={d}").data["stages"] for d in KNOWN}
    for full, half in zip(*found.values(), strict=True):
        assert half["macs"] == full["macs"], full["stage"]
    (calibrate, quantize, sample), (faster, less, same) = found.values()
    assert faster["seconds"] < 0.5 * calibrate["seconds"]
    assert 0.3 * quantize["seconds"] < less["seconds"] < quantize["seconds"]
    assert same["seconds"] == sample["seconds"]  # integers
