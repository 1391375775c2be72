"""A quantized denoiser as an ONNX graph, and the runtimes that read it."""
