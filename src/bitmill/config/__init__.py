"""Registries, options and their parsing."""
