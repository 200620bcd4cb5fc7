"""Run calibration text through the blocks of a model and collect statistics."""
