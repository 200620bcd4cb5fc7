"""One file per domain of text."""
