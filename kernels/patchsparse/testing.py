"""Dense-and-mask for any model, and the check of a sparsified model of your own against it."""

from .adoption.dense_and_mask import DenseAndMask
from .adoption.parity import check_parity

__all__ = ["DenseAndMask", "check_parity"]
