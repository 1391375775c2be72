"""Integer kernels for GPUs, in Triton: the backend cuda-int8."""
