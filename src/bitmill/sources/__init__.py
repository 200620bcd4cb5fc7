"""Where float weights come from: Hugging Face folders, GGUF files, live modules, demo models."""
