"""Forecast rain in mm/h: find the newest frames, run a predictor, write what it says."""
