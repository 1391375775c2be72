"""Class-conditional latent diffusion as a pipeline that diffusers saves and loads.

LDM-4 ImageNet and the packaged fashion-ldm condition on a class through one cross-attention
token (LDM, arXiv 2112.10752); diffusers has the parts but no pipeline that joins them.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Learned class embedding as a cross-attention context of one token.

    class_labels: [N] int64 in [0, num_classes]; num_classes itself is the null class of
    classifier-free guidance. Returns [N, 1, embed_dim]. Raises IndexError for other labels.
    """

    @register_to_config
    def __init__(self, num_classes: int = 1000, embed_dim: int = 512):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embed_dim)

    @property
    def null_class(self) -> int:
        return self.config.num_classes

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding(class_labels)[:, None, :]


class ClassConditionalLDMPipeline(DiffusionPipeline):
    """Latent diffusion conditioned on a class; called like DiTPipeline.

    Components: unet (noise prediction in latents), vqvae (first stage), class_embedder, scheduler.
    """

    model_cpu_offload_seq = "class_embedder->unet->vqvae"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vqvae: VQModel,
        class_embedder: ClassEmbedder,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, vqvae=vqvae, class_embedder=class_embedder, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | Tensor,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per label.

        guidance_scale: eps = eps_null + guidance_scale * (eps_class - eps_null); 1 turns it off.
        output_type: "pil", "np" ([N, H, W, C] in [0, 1]) or "latent" ([N, C, h, w]).
        """
        device = self._execution_device
        labels = torch.as_tensor(class_labels, device=device)
        config = self.unet.config
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        context = self.class_embedder(labels)
        guided = guidance_scale != 1.0
        if guided:
            null = self.class_embedder(torch.full_like(labels, self.class_embedder.null_class))
            context = torch.cat([null, context])
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            eps = self.unet(model_input, t, encoder_hidden_states=context).sample
            if guided:
                eps_null, eps_class = eps.chunk(2)
                eps = eps_null + guidance_scale * (eps_class - eps_null)
            x = self.scheduler.step(eps, t, x).prev_sample
        if output_type == "latent":
            images = x
        else:
            decoded = self.vqvae.decode(x / self.vqvae.config.scaling_factor).sample
            images = (decoded / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
