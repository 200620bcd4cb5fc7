"""Modules that hold packed weights, and functions that replace a model's layers by them and back."""
