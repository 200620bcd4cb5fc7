"""Which of the storable numbers is chosen. One file per solver."""

from bitmill.solvers.base import SOLVERS, Learner, Solver, Statistics

__all__ = ["SOLVERS", "Learner", "Solver", "Statistics"]
