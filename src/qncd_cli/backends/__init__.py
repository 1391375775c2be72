"""What computes quantized layers: the simulation, which is the oracle, and integer kernels.

A backend knows layers, no models and no files.
"""
