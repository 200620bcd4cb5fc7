"""Pure functions of tensors, independent of formats, models and files."""
