"""Finetune forecasters on whole images."""
