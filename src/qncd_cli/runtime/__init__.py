"""A denoiser that can be called, and what is drawn with it: quantized layers put into a model, the
backend that computes them, compiled or exported graphs, trajectories of the configured sampler.
Nothing here decides what a layer becomes; sample sets and artifacts are written elsewhere.
"""
