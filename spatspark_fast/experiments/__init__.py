"""Repeat the paper's ablations."""
