"""Training of a quantized model from end to end: codes stay, what its formats store as numbers learns."""
