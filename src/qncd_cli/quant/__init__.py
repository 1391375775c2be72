"""Mathematics of quantization on tensors: affine codes, packing, observers, smoothing, rounding,
quantized layers. It knows neither files nor models nor configurations.
"""
