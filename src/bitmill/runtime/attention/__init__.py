"""Attention of single tokens on packed keys and values: the layout of pages, and the kernels that read them."""
