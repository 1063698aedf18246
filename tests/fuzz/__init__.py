"""Hostile and damaged inputs, drawn from a seed: ``python -m tests.fuzz``."""
