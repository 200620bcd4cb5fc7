"""What is learned around the quantized layers of a block, and with which loss. One file per tuner."""

from bitmill.tuners.base import TUNERS, BlockTask, Tuner

__all__ = ["TUNERS", "BlockTask", "Tuner"]
