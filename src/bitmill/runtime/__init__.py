"""Run quantized models: packed layers, kernels, attention on packed keys and values, the compiled decode step."""
