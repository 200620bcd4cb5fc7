"""Sweeps: every layer of a model rounded in every format of a table, weights or inputs."""
