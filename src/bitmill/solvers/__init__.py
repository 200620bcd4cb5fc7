"""Which of the storable numbers is chosen. One file per solver."""

from bitmill.solvers.base import SOLVERS, Solver, Statistics

__all__ = ["SOLVERS", "Solver", "Statistics"]
