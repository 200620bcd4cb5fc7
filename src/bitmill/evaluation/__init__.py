"""Metrics over windows of tokens, and text generation."""
