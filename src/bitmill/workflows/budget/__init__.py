"""Quantize to a budget: choose a format for every layer, verify the plan on text, and write the better one."""
