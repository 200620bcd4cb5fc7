"""Exports: a quantized folder as the checkpoint of another program."""
