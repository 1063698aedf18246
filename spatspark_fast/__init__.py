"""Pretrain, finetune and run convolutional radar-nowcasting models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatspark_fast.forecast.nowcasting import nowcast, pysteps_method

__version__ = "0.1.0"

__all__ = ["__version__", "nowcast", "pysteps_method"]


def __getattr__(name: str) -> Any:
    """Import the functions of this page when they are first used: torch takes seconds."""
    if name in ("nowcast", "pysteps_method"):
        from spatspark_fast.forecast import nowcasting

        return getattr(nowcasting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
