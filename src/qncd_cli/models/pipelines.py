"""Class-conditional diffusion as pipelines that diffusers saves and loads.

LDM-4 ImageNet and the packaged fashion-ldm and emoji-ldm condition on a class through one
cross-attention token (LDM, arXiv 2112.10752); ADM and fashion-ddpm add a class embedding to the
timestep's in pixel space; diffusers has the parts but no pipeline that joins them. Its DiTPipeline
takes class 1000 for the null class whatever the model; fashion-dit has ten.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .image_size import Sides, check_sizable, latent_sides, pixels_per_latent, sides_of


def is_guided(scale: float, interpolates: bool) -> bool:
    """Whether a guidance scale guides, by the rule of the pipeline's class.

    interpolates: of the pipelines below, where only 1 is off and 0 is the null class alone (LDM,
    arXiv 2112.10752); in those of diffusers guidance is off up to 1, so that 0 keeps the prompt.
    """
    return scale != 1.0 if interpolates else scale > 1.0


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Learned class embedding as a cross-attention context, of one token unless told otherwise.

    class_labels: [N] int64 in [0, num_classes]; num_classes itself is the null class of
    classifier-free guidance. Returns [N, tokens, embed_dim]. Raises IndexError for other labels.
    """

    @register_to_config
    def __init__(self, num_classes: int = 1000, embed_dim: int = 512, tokens: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, tokens * embed_dim)

    @property
    def null_class(self) -> int:
        return self.config.num_classes

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding(class_labels).unflatten(1, (self.config.tokens, -1))


class ClassConditionalPipeline(DiffusionPipeline, ABC):
    """What the class-conditional pipelines below share: the guided sampling loop.

    A subclass names its components and says what the denoiser is, how a class enters it, which
    class is the null class of classifier-free guidance, and how latents become images.
    """

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The component that predicts."""

    @property
    @abstractmethod
    def null_class(self) -> int:
        """The label that stands for no class."""

    @abstractmethod
    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Class labels [N] -> keyword arguments of the denoiser, batch first."""

    def decode(self, latents: Tensor) -> Tensor:
        """[N, C, h, w] -> images [N, C, H, W] in about [-1, 1]."""
        return latents

    def _latent_sides(self, height: int | None, width: int | None) -> Sides:
        """Raises ModelError for a size that cannot be."""
        config: Any = self.denoiser.config
        own = sides_of(config.sample_size)
        if height is None and width is None:
            return own
        name, first_stage = type(self).__name__, self.components.get("vqvae")
        check_sizable(name, self.denoiser, first_stage)
        factor = pixels_per_latent(first_stage)
        size = (height or factor * own[0], width or factor * own[1])
        return latent_sides(name, self.denoiser, factor, size)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | Tensor,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per label.

        guidance_scale: eps = eps_null + guidance_scale * (eps_class - eps_null); 1 turns it off,
        0 is the null class alone.
        output_type: "pil", "np" ([N, H, W, C] in [0, 1]) or "latent" ([N, C, h, w]).
        height, width: in pixels, of U-Nets in latents; None for the model's own.
        """
        device = self._execution_device
        labels = torch.as_tensor(class_labels, device=device)
        config: Any = self.denoiser.config
        shape = (len(labels), config.in_channels, *self._latent_sides(height, width))
        guided = is_guided(guidance_scale, interpolates=True)
        if guided:
            labels = torch.cat([torch.full_like(labels, self.null_class), labels])
        condition = self.condition(labels)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.denoiser.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            prediction = self.denoiser(
                model_input, timestep=t.expand(len(labels)), **condition
            ).sample
            if guided:
                null, asked = prediction.chunk(2)
                prediction = null + guidance_scale * (asked - null)
            x = self.scheduler.step(prediction, t, x).prev_sample
        if output_type == "latent":
            images = x
        else:
            decoded = self.decode(x)
            images = (decoded / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class ClassConditionalLDMPipeline(ClassConditionalPipeline):
    """Latent diffusion conditioned on a class; called like DiTPipeline.

    Components: unet (in latents), vqvae (first stage), class_embedder, scheduler.
    """

    model_cpu_offload_seq = "class_embedder->unet->vqvae"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vqvae: VQModel | AutoencoderKL,
        class_embedder: ClassEmbedder,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, vqvae=vqvae, class_embedder=class_embedder, scheduler=scheduler
        )

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def null_class(self) -> int:
        return self.class_embedder.null_class

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.class_embedder(labels.to(self.class_embedder.device))}

    def decode(self, latents: Tensor) -> Tensor:
        return self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample


class ClassConditionalPixelPipeline(ClassConditionalPipeline):
    """Pixel-space diffusion conditioned on a class; the last class embedding is the null class.

    Components: unet (with num_class_embeds), scheduler.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def null_class(self) -> int:
        return self.unet.config.num_class_embeds - 1

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        return {"class_labels": labels.to(self.unet.device)}


class ClassConditionalDiTPipeline(ClassConditionalPipeline):
    """A diffusion transformer in latents, conditioned on a class.

    Components: transformer (its class embeddings' extra row is the null class), vqvae, scheduler.
    """

    model_cpu_offload_seq = "transformer->vqvae"

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vqvae: VQModel | AutoencoderKL,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vqvae=vqvae, scheduler=scheduler)

    @property
    def denoiser(self) -> nn.Module:
        return self.transformer

    @property
    def null_class(self) -> int:
        return self.transformer.config.num_embeds_ada_norm

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        return {"class_labels": labels.to(self.transformer.device)}

    def decode(self, latents: Tensor) -> Tensor:
        return self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample


CLASS_CONDITIONAL: dict[str, type[ClassConditionalPipeline]] = {
    kind.__name__: kind
    for kind in (
        ClassConditionalLDMPipeline,
        ClassConditionalPixelPipeline,
        ClassConditionalDiTPipeline,
    )
}
