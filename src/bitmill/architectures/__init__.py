"""Descriptions of model architectures as data."""
