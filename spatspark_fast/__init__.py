"""Pretrain, finetune and run convolutional radar-nowcasting models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatspark_fast.evaluate.scoring import evaluate_forecaster
    from spatspark_fast.forecast.nowcasting import nowcast, pysteps_method
    from spatspark_fast.models.registry import load_forecaster

__version__ = "0.1.0"

__all__ = ["__version__", "evaluate_forecaster", "load_forecaster", "nowcast", "pysteps_method"]

_HOMES = {
    "evaluate_forecaster": "spatspark_fast.evaluate.scoring",
    "load_forecaster": "spatspark_fast.models.registry",
    "nowcast": "spatspark_fast.forecast.nowcasting",
    "pysteps_method": "spatspark_fast.forecast.nowcasting",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used: torch takes seconds."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
