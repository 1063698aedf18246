"""Pretrain, finetune and run convolutional radar-nowcasting models."""

__version__ = "0.1.0"
