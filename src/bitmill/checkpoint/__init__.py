"""The quantized model on disk: an ordinary Hugging Face folder with packed tensors and a full record."""
