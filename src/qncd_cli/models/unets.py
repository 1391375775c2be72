"""U-Nets that diffusers has the parts of, but no configuration for."""

from __future__ import annotations

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

# A pipeline that is loaded looks in the module of a part for the class that says how to load it.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401


class MultiHeadUNet2DModel(UNet2DModel):
    """UNet2DModel with one number of attention heads at every width; there heads have one width.

    LDM-8 LSUN-Churches has 8 heads over 192 to 768 channels. Raises ValueError for a number that
    does not divide the channels.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("AttnDownBlock2D",),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D",),
        block_out_channels: tuple[int, ...] = (192,),
        layers_per_block: int = 2,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        resnet_time_scale_shift: str = "default",
        attn_norm_num_groups: int | None = None,
        num_heads: int = 8,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attn_norm_num_groups=attn_norm_num_groups,
            attention_head_dim=None,
        )
        for name, module in self.named_modules():
            if not isinstance(module, Attention):
                continue
            if module.inner_dim % num_heads:
                raise ValueError(f"{name}: {num_heads} heads do not divide {module.inner_dim}")
            module.heads = num_heads
            module.scale = (module.inner_dim // num_heads) ** -0.5
