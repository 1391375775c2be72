"""qncd: post-training quantization of diffusion models with noise correction (QNCD)."""

__version__ = "0.1.0"
