"""What executes a quantized layer."""
