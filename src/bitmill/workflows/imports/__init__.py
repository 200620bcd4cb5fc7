"""Imports: checkpoints of other programs as quantized folders."""
