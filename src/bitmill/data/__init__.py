"""Text, token windows and calibration data."""
