"""U-Nets in the names of guided-diffusion, which say nothing of themselves but their tensors."""

from __future__ import annotations

import pytest
import torch
from oracles.compvis_reference import UNetModel

from qncd_cli.errors import ModelError
from qncd_cli.models.compvis.adm import ADMOptions, adm_unet

PARAMS = {
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (2, 4),
    "num_head_channels": 32,
}
OPTIONS = ADMOptions(16, head_channels=32)


def reference(updown: bool, scale_shift: bool = True) -> UNetModel:
    torch.manual_seed(0)
    params = {**PARAMS, "resblock_updown": updown, "use_scale_shift_norm": scale_shift}
    return UNetModel(params).eval()


def stacked(state):
    """All of q, then all of k, then all of v, as use_new_attention_order has it."""

    def reordered(tensor):
        heads = tensor.reshape(-1, 3, 32, *tensor.shape[1:])
        return heads.transpose(0, 1).reshape(tensor.shape)

    return {name: reordered(t) if ".qkv." in name else t for name, t in state.items()}


@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_it_computes_what_guided_diffusion_computes(updown, scale_shift, together):
    theirs = reference(updown, scale_shift)
    state = theirs.state_dict()
    options = ADMOptions(16, 32, stacked=not together)
    ours = adm_unet(state if together else stacked(state), options, "weights.pt")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7.0, 1095.5])
    with torch.no_grad():
        difference = (ours(x, t).sample - theirs(x, t)).abs().max()
    assert difference < 1e-5


def test_classes_are_embedded():
    state = reference(True).state_dict()
    labels = torch.randn(11, 128)
    unet = adm_unet({**state, "label_emb.weight": labels}, OPTIONS, "weights.pt")
    assert torch.equal(unet.class_embedding.weight, labels)
    assert unet.config.num_class_embeds == 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out.0.weight": None}, "1 tensor missing .out.0.weight"),
        ({"head.weight": torch.zeros(3)}, "1 tensor not known .head.weight"),
        ({"out.0.bias": torch.zeros(3)}, "out.0.bias is .3."),
        ({"input_blocks.0.0.weight": None}, "is no U-Net of ADM"),
        ({"output_blocks.2.2.in_layers.2.weight": None}, "is no U-Net of ADM"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    state = {**reference(True).state_dict(), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ModelError, match=f"weights.pt: .*{said}"):
        adm_unet(state, OPTIONS, "weights.pt")


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="heads of 48 channels"):
        adm_unet(reference(True).state_dict(), ADMOptions(16, 48), "weights.pt")
