"""Adapters, one file per architecture; the registry imports them on first use."""
