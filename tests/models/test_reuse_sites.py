"""Sites that a denoiser's work can be left out at: of U-Nets and of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import save_tiny_dit_pipeline, save_tiny_pipeline, save_tiny_pixel_pipeline
from diffusers_pipelines import save
from torch import nn

from qncd_cli.models.loading import load_model
from qncd_cli.models.reuse_sites import MOST_SITES, install_sites, remove_sites, reuse_chains
from qncd_cli.models.text import Prompts
from qncd_cli.models.topology import LayerCost, count_macs

OWN = {
    "class-conditional U-Net": save_tiny_pipeline,
    "pixel U-Net": save_tiny_pixel_pipeline,
    "DiT": save_tiny_dit_pipeline,
}
OTHERS = ("StableDiffusionXLPipeline", "PixArtSigmaPipeline", "StableDiffusion3Pipeline")
FLUX = "FluxPipeline, schnell"


@pytest.fixture(scope="module", params=[*OWN, *OTHERS, FLUX])
def call(request, tmp_path_factory):
    """A denoiser, and a call of it on two rows."""
    folder = tmp_path_factory.mktemp("model")
    if request.param in OWN:
        OWN[request.param](folder)
        model = load_model(str(folder))
    else:
        save(request.param, folder)
        model = load_model(str(folder), prompts=Prompts(("a red shoe", "a bag"), ""))
    condition = model.condition(torch.tensor([0, 1]))
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    times = torch.full((2,), 300.0)

    def run(module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return module(x, times, **condition).sample

    return model.denoiser, run


def test_a_site_with_its_own_value_changes_no_bit_of_a_unet_and_rounding_of_a_transformer(call):
    module, run = copy.deepcopy(call[0]), call[1]
    wanted = run(module)
    sites = [site for chain in reuse_chains(module) for site in chain]
    kept = install_sites(module, sites)
    assert torch.equal(run(module), wanted)
    taken, kept.taken = kept.taken, {}
    assert taken.keys() == {site.name for site in sites}
    for site in sites:
        kept.given = {site.name: taken[site.name]}
        found = run(module)
        if site.residual:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found, wanted)
        kept.given = {site.name: 1.5 * taken[site.name]}
        assert not torch.allclose(run(module), wanted, atol=1e-4)
    remove_sites(module, sites)
    assert all("forward" not in part.__dict__ for part in module.modules())


def layers(module: nn.Module, run) -> list[LayerCost]:
    """Costs of convolutions and linear layers; DiT's last norm calls a layer of its first block."""
    costs = count_macs(module, lambda: run(module))
    return [c for c in costs if c.kind != "matmul" and ".0.norm1.emb." not in c.name]


def test_what_a_site_holds_is_not_computed_and_the_rest_is(call):
    module, run = copy.deepcopy(call[0]), call[1]
    whole = layers(module, run)
    sites = [site for chain in reuse_chains(module) for site in chain]
    kept = install_sites(module, sites)
    run(module)
    taken = kept.taken
    for site in sites:
        kept.given = {site.name: taken[site.name]}
        left = layers(module, run)
        assert left == [cost for cost in whole if not site.holds(cost.name)]
        assert len(left) < len(whole)


def test_sites_of_a_chain_lie_within_each_other(call):
    chains = reuse_chains(call[0])
    for chain in chains:
        for outer, inner in zip(chain, chain[1:], strict=False):
            assert set(inner.modules) < set(outer.modules)
    seen = [name for chain in chains for name in chain[0].modules]
    assert len(seen) == len(set(seen))


def test_a_wider_site_has_a_value_where_a_narrower_one_is_kept_and_a_narrower_one_has_none(call):
    module, run = copy.deepcopy(call[0]), call[1]
    (chain,) = reuse_chains(module)
    kept = install_sites(module, chain)
    run(module)
    values = dict(kept.taken)
    for place, site in enumerate(chain):
        kept.given, kept.taken = {site.name: values[site.name]}, {}
        run(module)
        assert kept.taken.keys() == {wider.name for wider in chain[:place]}
        for name, value in kept.taken.items():
            torch.testing.assert_close(value, values[name], rtol=1e-4, atol=1e-5)


def test_many_blocks_are_few_sites():
    module = nn.Module()
    module.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(28))
    (chain,) = reuse_chains(module)
    assert len(chain) == MOST_SITES
    assert chain[0].name == "transformer_blocks.0-27" and len(chain[0].modules) == 28
    assert chain[-1].name == "transformer_blocks.12-15"


def test_a_denoiser_without_blocks_has_no_sites():
    assert reuse_chains(nn.Linear(2, 2)) == []
