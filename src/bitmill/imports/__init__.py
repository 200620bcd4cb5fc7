"""Matrices that other programs quantized, as formats of bitmill that hold them to the bit."""
