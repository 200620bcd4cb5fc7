"""The progress of long work: reported by workflows, displayed on terminals and in notebooks."""

from bitmill.progress.base import Progress, high_water_mark, peak_memory_bytes

__all__ = ["Progress", "high_water_mark", "peak_memory_bytes"]
