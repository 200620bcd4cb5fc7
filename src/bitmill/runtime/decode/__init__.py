"""Decoding token by token in compiled code (csrc/step): Python would take longer than a small model's products."""

from bitmill.runtime.decode.forward import attach, decode_path, detach

__all__ = ["attach", "decode_path", "detach"]
