"""Packed layers as nn.Module."""
