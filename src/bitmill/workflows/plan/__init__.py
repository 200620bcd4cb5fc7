"""Memory plans: bytes of weights, keys and values and activations, from a model's config alone."""
