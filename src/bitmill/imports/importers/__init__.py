"""The kinds of checkpoints of other programs, one a module."""
