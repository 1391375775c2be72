"""A quantized denoiser as one compiled graph: operators, their fusion, kernels in C++."""
