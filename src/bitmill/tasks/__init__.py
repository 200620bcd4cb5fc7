"""Tasks: the kinds of models, by how they read text and are measured."""
