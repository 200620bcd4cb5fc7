"""Sources of float models: Hugging Face folders, GGUF files, live modules and demo models."""
