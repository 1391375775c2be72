"""Diffusion models from folders, hub ids and checkpoints: what is loaded, checked, conditioned and
decoded, and the layers that can be quantized. No sampling.
"""
