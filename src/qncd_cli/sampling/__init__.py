"""The denoising loop over diffusers' schedulers, noise levels, and randomness by seed."""
