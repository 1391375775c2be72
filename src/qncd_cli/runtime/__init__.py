"""A denoiser that can be called: quantized layers put into a model, the backend that computes
them, compiled or exported graphs, and the model whose samples are drawn.
"""
