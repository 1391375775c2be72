"""The two scripts that say how far two ways of computing one quantized model are apart."""

from __future__ import annotations

import agreement
import layer_agreement
import pytest
import torch
from click.testing import CliRunner

from qncd_cli.backends import int8
from qncd_cli.bench import table
from qncd_cli.config.loading import parse_config
from qncd_cli.models.loading import load_model

why = int8.why_unavailable(torch.device("cpu"))
needs_int8 = pytest.mark.skipif(bool(why), reason=why)


def compared(source):
    config = parse_config({"model": {"source": str(source)}}, "test")
    return layer_agreement.compare(load_model(str(source)), table.quick_config(config, (4, 8)))


@needs_int8
def test_layers_agree_and_one_that_does_not_is_named(tiny_model, monkeypatch):
    found = compared(tiny_model)
    assert found.compared > 20
    assert found.largest < 1e-5
    real = int8.compute
    off = "conv_out"

    def wrong(layer, x):
        y = real(layer, x)
        return 1.01 * y if layer.weight_shape[0] == 3 else y

    monkeypatch.setattr(int8, "compute", wrong)
    found = compared(tiny_model)
    assert found.worst == off
    assert found.largest == pytest.approx(0.01, rel=1e-3)


def compare_sets(first, second):
    return CliRunner().invoke(agreement.main, [first, second, "--run-dir", "runs/tiny"])


def test_sets_of_the_same_seeds_are_compared_and_others_refused(qncd, tmp_path, monkeypatch):
    qncd("calibrate", "--config", "tiny.yaml")
    qncd("quantize")
    for name, extra in (
        ("one", ("--backend", "simulate")),
        ("two", ("--backend", "simulate")),
        ("full", ("--full-precision",)),
        ("later", ("--backend", "simulate", "--seed", "9")),
    ):
        qncd("sample", "--num", "2", "--name", name, *extra)
    monkeypatch.chdir(tmp_path)
    same = compare_sets("one", "two")
    assert "2 of 2 images are identical, the latents are equal" in same.output
    other = compare_sets("one", "full")
    assert "the latents are not equal" in other.output
    refused = compare_sets("one", "later")
    assert refused.exit_code == 3
    assert "different seeds" in refused.output
