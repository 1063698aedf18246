"""Presets of finetune, one YAML file each."""
