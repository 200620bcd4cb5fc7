"""Comparisons: a grid of recipes, each quantized and measured in its own process under equal conditions."""
