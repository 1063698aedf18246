"""Check a sparsified model of your own against dense-and-mask."""

from .adoption.parity import check_parity

__all__ = ["check_parity"]
