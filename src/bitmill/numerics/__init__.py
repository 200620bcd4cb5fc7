"""Pure functions of tensors; nothing here knows a format, a model or a file."""
