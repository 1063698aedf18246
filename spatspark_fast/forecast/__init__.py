"""Forecasts in mm/h: predictors, sources of the newest frames, and what is written of a forecast."""
