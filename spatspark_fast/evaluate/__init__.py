"""Score forecasts side by side: run predictors over windows, write reports, draw pictures."""
