"""Decoding token by token in compiled code: what transformers spends between the products is most of a small model's time."""

from bitmill.runtime.decode.forward import decode_path, speed_up

__all__ = ["decode_path", "speed_up"]
