"""Quantization mathematics on tensors; knows neither files nor models."""
