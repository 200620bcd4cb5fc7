"""Published methods of KV cache quantization, one per file: options, and the scheme they make."""
