"""Benchmarks: every speed is a ratio measured in one run, after a parity check."""
