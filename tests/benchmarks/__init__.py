"""Tests of what the benchmarks rely on: that peers are given the right problem, and that tables are kept."""
