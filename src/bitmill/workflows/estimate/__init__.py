"""Estimates of a quantization before it starts: time and memory from a short probe, size from shapes."""
