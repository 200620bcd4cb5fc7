"""What kinds of models read, return and are measured by, one module per task."""
