"""Models whose weights are in memory only while they are used."""
