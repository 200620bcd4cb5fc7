"""Text, windows of tokens, and calibration text that a model writes itself."""
