"""Packed KV cache: storage schemes, codecs and page layout, the cache of transformers, and its calibration."""

from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, TensorScheme

__all__ = ["KV_METHODS", "KVMethod", "Scheme", "TensorScheme"]
