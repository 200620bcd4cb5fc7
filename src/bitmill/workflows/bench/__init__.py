"""Benchmarks: single kernels against memory bandwidth, and whole models in tokens per second."""
