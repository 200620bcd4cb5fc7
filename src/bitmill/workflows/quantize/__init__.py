"""Quantize a model: to a recipe, or to a budget."""
