"""Solvers: they choose which of the storable numbers represent a matrix. One file per solver."""

from bitmill.numerics.statistics import Statistics
from bitmill.solvers.base import SOLVERS, Learner, Solver

__all__ = ["SOLVERS", "Learner", "Solver", "Statistics"]
