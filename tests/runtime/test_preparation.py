"""What a model is prepared with for sampling: which backend, a graph or none."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.backends import int8
from qncd_cli.backends.base import AUTO
from qncd_cli.errors import BackendUnavailable
from qncd_cli.runtime import preparation
from qncd_cli.runtime.auto_backend import BackendCache
from qncd_cli.runtime.compiled_graph import GraphDenoiser
from qncd_cli.runtime.preparation import Preparation, prepare
from qncd_cli.spec import Compile

why = int8.why_unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(why), reason=why)

YES, NO, WHERE_IT_PAYS = Compile


@pytest.fixture
def prepared(made, tmp_path):
    """`prepare` for four samples, and what it told."""

    def call(full_precision=False, **options):
        said = []
        config, model, *quantized = made
        how = Preparation([0, 1, 2, 3], 2, 10**6, tmp_path, said.append, **options)
        return prepare(config, model, None if full_precision else tuple(quantized), how), said

    return call


GRAPH, EAGER = {"compiled": True}, {"backend": "int8"}


@pytest.mark.parametrize(
    ("pays", "options", "tried"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"compile": NO}, False),
        (True, {"begun": EAGER}, False),
        (False, {"begun": GRAPH}, True),
        (False, {"begun": {}}, False),
        (True, {"begun": {}}, True),
        (True, {"begun": GRAPH, "compile": NO}, False),
        (True, {"low_memory": True}, False),
        (True, {"begun": GRAPH, "low_memory": True}, False),
        (True, {"backend": "simulate"}, False),
        (True, {"full_precision": True}, False),
        (False, {"full_precision": True, "begun": GRAPH}, True),
    ],
)
def test_a_graph_is_made_where_it_pays_or_the_set_began_with_one(
    prepared, monkeypatch, pays, options, tried
):
    """Without a compiler, trying leaves a line and the denoiser as it is."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(preparation, "WORTH_COMPILING", 0 if pays else float("inf"))
    sampled, said = prepared(**options)
    assert len(said) == tried and all("it runs uncompiled" in line for line in said)
    assert not sampled.compiled


@pytest.mark.parametrize("options", [{}, {"full_precision": True}, {"begun": EAGER}])
def test_a_graph_that_was_asked_for_and_cannot_be_had_is_refused(prepared, monkeypatch, options):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailable, match="no-such-compiler"):
        prepared(compile=YES, **options)
    assert YES.going_on(False) is YES and NO.going_on(True) is NO
    assert WHERE_IT_PAYS.going_on(True) is YES and WHERE_IT_PAYS.going_on(False) is NO


def test_a_backend_without_graphs_is_not_compiled(prepared):
    with pytest.raises(BackendUnavailable, match="simulate has no graph"):
        prepared(compile=YES, backend="simulate")


def test_a_set_keeps_its_backend_and_a_row_has_that_of_its_table(prepared, made, tmp_path):
    begun = {"backend": "simulate"}
    assert prepared(begun=begun)[0].backend.name == "simulate"
    assert prepared(begun=begun, backend="int8")[0].backend.name == "int8"
    cache = BackendCache(tmp_path / "table", {"model": made[1].digest}, graphs=False)
    assert prepared(begun=begun, table=cache)[0].backend.name == "int8"
    cache.remember({"int8": 2.0, "simulate": 1.0})
    row, _ = prepared(table=cache, backend=AUTO)
    assert row.backend.name == "simulate" and "as measured before" in row.backend.remark
    assert prepared(table=cache, backend="int8")[0].backend.name == "int8"


def test_full_precision_has_no_backend_and_its_own_denoiser(prepared, made):
    sampled, said = prepared(full_precision=True)
    assert sampled.kind == "full" and sampled.backend is None and said == []
    assert sampled.denoiser.module is made[1].denoiser
    assert sampled.digests == {"model": made[1].digest}


def test_kernels_for_gpus_are_fused_only_where_that_is_said(prepared, monkeypatch):
    """A fused graph has other bits than `simulate`; a set that began with one goes on with it."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(preparation, "WORTH_COMPILING", 0)
    for options, fused in [
        ({}, False),
        ({"begun": GRAPH}, True),
        ({"begun": GRAPH, "compile": NO}, False),
        ({"compile": YES, "low_memory": True}, False),
    ]:
        sampled, said = prepared(backend="cuda-int8", **options)
        assert sampled.compiled is fused
        assert isinstance(sampled.denoiser, GraphDenoiser) is fused
        assert said == []
