"""The meter: what lives at once, on the meta device as with real tensors."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from qncd_cli.forecast.metering import metered, peak_bytes

KIB = torch.Size((256,))  # of float32


def test_what_lives_at_once_is_counted_and_what_died_is_not():
    with metered() as meter:
        a = torch.empty(KIB, device="meta")
        b = a + 1
        assert (meter.live, meter.peak) == (2048, 2048)
        del a
        assert (meter.live, meter.peak) == (1024, 2048)
        meter.restart()
        c = b.reshape(16, 16).transpose(0, 1)[2:]  # views
        assert (meter.live, meter.peak) == (1024, 1024)
        del b
        assert meter.live == 1024  # the view holds it
        del c
        assert meter.live == 0


def test_parameters_are_there_before():
    layer = torch.nn.Linear(64, 32, device="meta")
    assert peak_bytes(lambda: layer(torch.empty(8, 64, device="meta"))) == 4 * 8 * (64 + 32)


@pytest.mark.parametrize("backward", [False, True])
def test_the_meta_device_gives_the_peak_of_real_tensors(backward):
    """Of a whole U-Net, with attention, in both directions."""

    def peak(device: str) -> int:
        with torch.device(device):
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=2,
                norm_num_groups=8,
            )
            unet.requires_grad_(backward)
            x, t, context = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 3, 16)
        with torch.set_grad_enabled(backward), metered() as meter:
            output = unet(x, t, context).sample
            if backward:
                torch.autograd.grad(output, list(unet.parameters()), torch.empty_like(output))
        return meter.peak

    assert peak("meta") == pytest.approx(peak("cpu"), rel=0.02)


@pytest.mark.parametrize("operation", [torch.add, torch.sub, torch.mul, torch.div])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), 2),
        (torch.zeros(2, 3), torch.zeros(3)),
        (torch.zeros(2, 1), torch.zeros(1, 3)),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(())),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(2, 3).t(), 1.5),
    ],
)
def test_shortcuts_give_the_shape_type_and_order_of_the_operation(operation, a, b):
    expected = operation(a, b)
    with metered():
        found = operation(a.to("meta"), b.to("meta") if isinstance(b, torch.Tensor) else b)
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride()
