"""Published methods of the KV cache: one a file, as options and the scheme they make."""
