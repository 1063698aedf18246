"""Export the dense model to ONNX: rates in mm/h in, rates in mm/h out, any batch and size (extra ``onnx``)."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import atomic_path
from spatspark_fast.models.registry import LoadedForecaster

__all__ = ["RateModel", "export_onnx"]

_LARGEST = 8192  # pixels along a side: the exporter wants a bound


class RateModel(nn.Module):
    """Map ``rates`` ``(B, in_length, H, W)`` float32 mm/h to ``(B, out_length, H, W)`` mm/h of at least 0.

    No data must be 0, and H and W multiples of the model's ``multiple``.
    """

    def __init__(self, loaded: LoadedForecaster) -> None:
        super().__init__()
        self.model = loaded.model
        self.scale = loaded.scale

    def forward(self, rates: Tensor) -> Tensor:
        """Forecast; see the class."""
        made = self.model(units.normalised(rates, self.scale))
        return units.mm_per_hour(made, self.scale).clamp(min=0)


def export_onnx(loaded: LoadedForecaster, path: Path) -> None:
    """Write the model as one ONNX file; its metadata say units, lengths and what H and W must be multiples of.

    Raises:
        UserError: the packages of the extra ``onnx`` are missing, or the model cannot be exported.
    """
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'--export needs ONNX ({error}); pip install "spatspark-fast[onnx]"') from error
    model = RateModel(loaded).eval().cpu()
    multiple = loaded.multiple
    example = torch.zeros(2, loaded.in_length, 2 * multiple, 3 * multiple)
    try:
        program: Any = _export(model, example, multiple)
    except Exception as error:  # the exporter raises whatever its many steps do
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{loaded.name} cannot be exported to ONNX: {reason}") from error
    program.model.metadata_props.update(_metadata(loaded))
    with atomic_path(path) as temporary:
        program.save(str(temporary))


def _export(model: RateModel, example: Tensor, multiple: int) -> object:
    rows, columns = (multiple * torch.export.Dim(name, min=1, max=_LARGEST // multiple) for name in ("rows", "columns"))
    shapes = {"rates": {0: torch.export.Dim("batch"), 2: rows, 3: columns}}
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter's own deprecations and remarks are not ours to act on.
        warnings.simplefilter("ignore")
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return torch.onnx.export(
                model,
                (example,),
                input_names=["rates"],
                output_names=["forecast"],
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
        finally:
            logger.setLevel(level)


def _metadata(loaded: LoadedForecaster) -> dict[str, str]:
    return {
        "name": loaded.name,
        "input": "rates (batch, in_length, height, width), float32, mm/h, no data as 0, newest frame last",
        "output": "forecast (batch, out_length, height, width), float32, mm/h",
        "in_length": str(loaded.in_length),
        "out_length": str(loaded.out_length),
        "interval_minutes": f"{units.FRAME_MINUTES:g}",
        "multiple_of_pixels": str(loaded.multiple),
    }
