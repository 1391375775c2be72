"""A decoder in integers, computed by backends and as one graph."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from diffusers_pipelines import save

from qncd_cli.backends import int8
from qncd_cli.backends.base import BACKENDS
from qncd_cli.backends.compiled import graph as graphs
from qncd_cli.config.loading import parse_config
from qncd_cli.metrics.tensor import psnr_db
from qncd_cli.models import first_stage as first_stages
from qncd_cli.models.loading import first_stage_of, load_model
from qncd_cli.progress import no_progress
from qncd_cli.ptq.first_stage import quantize_first_stage
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime.first_stage import GraphDecoder, compiled, with_integers

NO_INT8 = int8.why_unavailable(torch.device("cpu"))
needs_int8 = pytest.mark.skipif(bool(NO_INT8), reason=NO_INT8)
NO_GRAPH = NO_INT8 or graphs.why_unavailable()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = save("DiTPipeline", tmp_path_factory.mktemp("dit") / "model")
    model = load_model(str(path))
    tree = tiny_config(
        path, first_stage__bits=8, correction={"intra": "none", "inter": {"method": "none"}}
    )
    return model, quantize_first_stage(parse_config(tree, "test"), model, no_progress)


def latents(rows: int, side: int = 8) -> torch.Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(3))


def decoded(made, backend: str, dtype: torch.dtype = torch.float32):
    return with_integers(first_stage_of(made[0]), made[1], "here", backend, dtype)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_kernels_make_the_simulation_s_images(made, dtype):
    x = latents(5)
    assert torch.equal(decoded(made, "int8", dtype)(x), decoded(made, "simulate", dtype)(x))


def test_what_stays_unquantized_computes_in_the_type_that_is_asked_for(made):
    x, own = latents(5), first_stage_of(made[0])
    before = own(x)
    images, rounded = (decoded(made, "simulate", d)(x) for d in (torch.float32, torch.bfloat16))
    assert not torch.equal(images, rounded)
    assert psnr_db(images, rounded) > 30
    assert torch.equal(own(x), before)
    assert {p.dtype for p in own.decoder.parameters()} == {torch.float32}


def test_a_backend_of_whole_denoisers_leaves_the_decoder_to_layers(made, monkeypatch):
    monkeypatch.setitem(
        BACKENDS,
        "whole",
        BACKENDS["openvino"].__class__(
            "whole", BACKENDS["simulate"].compute, "a graph", whole=True
        ),
    )
    layers = [m for m in decoded(made, "whole").decoder.modules() if isinstance(m, QuantizedLayer)]
    wanted = BACKENDS["simulate" if NO_INT8 else "int8"].compute
    assert layers and all(layer.compute is wanted for layer in layers)


@pytest.mark.skipif(bool(NO_GRAPH), reason=NO_GRAPH)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixels", "dtype"), [(None, torch.float32), (1, torch.float32), (1, torch.bfloat16)]
)
def test_a_graph_makes_the_same_images_and_is_kept(made, tmp_path, monkeypatch, pixels, dtype):
    """With room for one image a graph of one is made; a tile at the edge is computed eagerly."""
    if pixels:
        monkeypatch.setattr(first_stages, "DECODE_PIXELS", pixels)
    eager, told = decoded(made, "int8", dtype), []
    place = {"model": "a", "first_stage": "b"}, made[0].latent_shape, tmp_path, told.append
    graph = compiled(eager, *place)
    assert isinstance(graph.decoder, GraphDecoder)
    assert graph.decoder.rows == ((1, 1) if pixels else (2, 63))
    for rows in (1, 3):
        images, others = graph(latents(rows)), eager(latents(rows))
        if dtype == torch.float32:
            assert (images.int() - others.int()).abs().max() <= 1
        else:  # a graph rounds to it less often
            assert psnr_db(images, others) > 35
    edge = latents(2, 12)
    assert torch.equal(graph(edge), eager(edge))
    compiled(decoded(made, "int8", dtype), *place)
    assert told == ["compiling the decoder, once for this artifact and machine"]
