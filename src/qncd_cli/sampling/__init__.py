"""The denoising loop and its randomness."""
