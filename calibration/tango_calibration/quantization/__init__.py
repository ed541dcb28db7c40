"""A bundle → a quantized bundle."""
