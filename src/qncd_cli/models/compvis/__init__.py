"""Checkpoints of CompVis' latent diffusion and Stable Diffusion as diffusers modules."""
