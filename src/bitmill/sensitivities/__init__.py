"""Sensitivities: how much a model suffers when some of its layers get another format. One file per sensitivity."""

from bitmill.sensitivities.base import SENSITIVITIES, Sensitivity

__all__ = ["SENSITIVITIES", "Sensitivity"]
