"""Presets of pretrain, one YAML file each."""
