"""The packed cache of keys and values: which numbers it stores, how it holds them, how it is read."""

from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, TensorScheme

__all__ = ["KV_METHODS", "KVMethod", "Scheme", "TensorScheme"]
