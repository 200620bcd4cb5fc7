"""Compiled decoding of single tokens (csrc/step), without the overhead of Python."""

from bitmill.runtime.decode.forward import attach, decode_path, detach

__all__ = ["attach", "decode_path", "detach"]
