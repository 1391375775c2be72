"""Kernels for GPUs are compiled for named architectures, and their binaries are looked at."""

from __future__ import annotations

import itertools
import os

import gpu_calls
import gpu_kernels
import pytest
import torch
from click.testing import CliRunner

from qncd_cli.backends.cuda.tiles import ARCHITECTURES, FLAT, INT8, PACKED
from qncd_cli.config.loading import parse_config
from qncd_cli.models.loading import load_model
from qncd_cli.runtime.denoiser import denoiser_costs

pytest.importorskip("triton")
ALL = os.environ.get("QNCD_ARCHITECTURES") == "all"
"""Whether what is compiled for one architecture ordinarily is for each."""


@pytest.fixture(autouse=True)
def _own_cache(shared_folder, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared_folder / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def check(name: str, call: gpu_kernels.Call, architecture: int) -> None:
    """No spills, shared memory within the limit, products on the matrix units."""
    binary = gpu_kernels.compiled(call, architecture)
    assert binary.spills == 0, name
    assert binary.stack == 0, name
    assert 0 < binary.registers <= 255, name
    assert binary.shared <= 1024 * gpu_kernels.SHARED_LIMIT[architecture], name
    on_matrix_units = call.kernel in ("product", "matmul", "float_product")
    wide = call.kernel == "float_product" and call.operands[0].dtype == torch.float32
    assert (binary.matrix > 0) is (on_matrix_units and not wide), name


@pytest.mark.parametrize(
    ("tile", "packed", "form", "architecture"),
    [
        (INT8[0], False, "3x3 convolution", 90),
        (PACKED[1], True, "3x3 convolution", 80),
        (PACKED[2], True, "linear", 120),
        (FLAT[0], False, "linear", 89),
    ],
)
def test_some_tiles(tile, packed, form, architecture):
    call = gpu_calls.product_of(tile, packed, gpu_calls.FORMS[form])
    check(f"{tile} {form}", call, architecture)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_shipped_tiles_of_every_kernel():
    """Every third of a kernel's, each for one architecture, in turn; all for each with
    QNCD_ARCHITECTURES=all."""
    found = list(gpu_calls.shipped())
    assert len(found) >= 2 * (len(INT8) + len(PACKED) + len(FLAT))
    kernels = dict.fromkeys(call.kernel for _, call in found)
    some = [each for k in kernels for each in [e for e in found if e[1].kernel == k][::3]]
    pairs = list(zip(some, itertools.cycle(ARCHITECTURES), strict=False))
    if ALL:
        pairs = list(itertools.product(found, ARCHITECTURES))
    for (name, call), architecture in pairs:
        check(f"{name}, sm_{architecture}", call, architecture)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ARCHITECTURES if ALL else [min(ARCHITECTURES), max(ARCHITECTURES)]
)
def test_every_end_of_a_product(architecture):
    """What is added to, what is added, the next layer's codes; high bytes; types of outputs."""
    residual = torch.empty(8 * 4096, 192, dtype=torch.bfloat16, device="meta")
    before = residual.float()
    for tile, packed in ((INT8[0], False), (PACKED[0], True)):
        for dtype, options in (
            (torch.bfloat16, {"residual": residual}),
            (
                torch.bfloat16,
                {"residual": residual, "following": gpu_calls.smoothing_quantizer(8)},
            ),
            (torch.float32, {"before": before, "high": True, "input_scale_first": True}),
        ):
            check(
                str(options),
                gpu_calls.product_of(tile, packed, (), dtype, **options),
                architecture,
            )


def test_triton_has_no_product_of_bytes_for_turing():
    """Why tiles.OLDEST is what it is; a Triton that has one makes this fail."""
    with pytest.raises(RuntimeError, match="PassManager"):
        gpu_kernels.compiled(gpu_calls.product_of(INT8[2], False, ()), 75)


def test_a_spill_is_seen():
    """A tile that is too large for its threads does not pass."""
    tile = gpu_calls.Tile(128, 128, 64, 2, 2)
    binary = gpu_kernels.compiled(gpu_calls.product_of(tile, False, ()), 80)
    assert binary.spills > 0
    assert binary.stack > 0


def test_the_roofline_counts_the_layers():
    layers = gpu_kernels.products("zoo:fashion-ldm", 2)
    config = parse_config({"model": {"source": "zoo:fashion-ldm"}}, "test")
    costs = denoiser_costs(config, load_model("zoo:fashion-ldm"))
    macs = sum(cost.macs for cost in costs if cost.kind != "matmul")
    assert sum(layer.macs for layer in layers) == 2 * macs
    for card in gpu_kernels.CARDS:
        eight, half, share = gpu_kernels.least_seconds(layers, card, 8)
        four, _, _ = gpu_kernels.least_seconds(layers, card, 4)
        assert 0 < four <= eight < half
        assert 0 < share < 1
    run = CliRunner().invoke(gpu_kernels.cli, ["roofline", "--model", "zoo:fashion-ldm"])
    assert run.exit_code == 0
    assert "A100" in run.output
