"""Score rain forecasts by torchmetrics states: errors, contingency tables, fractions skill and power spectra."""
