"""GGUF files as a source of float weights."""
