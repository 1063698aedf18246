"""Pretrain encoders by masked image modelling."""
