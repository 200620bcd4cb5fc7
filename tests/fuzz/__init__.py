"""Damaged and hostile files for everything that bitmill reads: `make fuzz MINUTES=10 SEED=n`."""
