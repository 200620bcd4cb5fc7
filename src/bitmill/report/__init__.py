"""Human-readable renderings of result data; nothing here computes or measures."""
