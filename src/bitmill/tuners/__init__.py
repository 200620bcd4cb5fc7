"""Tuners: they learn parameters around the quantized layers of a block. One file per tuner."""

from bitmill.tuners.base import TUNERS, BlockTask, Tuner

__all__ = ["TUNERS", "BlockTask", "Tuner"]
