"""Quantized matrices in the tensors of other programs."""
