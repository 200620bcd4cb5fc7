"""Lint: whether an engine will load a quantized folder, before it is made or copied."""
