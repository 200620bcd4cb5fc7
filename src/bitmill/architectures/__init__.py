"""Descriptions of model architectures as data, and the sites where a model can be quantized."""
