"""What a model is worth: perplexity, divergence from the float model, embeddings, generated text."""
