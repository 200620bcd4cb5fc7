"""Which of the storable numbers is chosen. One file per solver."""

from bitmill.solvers.base import SOLVERS, Solver, Statistics, solver_from_dict

__all__ = ["SOLVERS", "Solver", "Statistics", "solver_from_dict"]
