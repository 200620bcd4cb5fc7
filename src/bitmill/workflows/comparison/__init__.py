"""A grid of recipes and bits, quantized and measured on the same terms: what `bitmill compare` runs."""
