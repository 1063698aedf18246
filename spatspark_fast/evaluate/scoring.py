"""Run predictors over the windows of a file and score them, a few windows in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import check_choice
from spatspark_fast.common.progress import Track, silently
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.forecast.predictors import ModelPredictor, Predictor, choose_device
from spatspark_fast.models.forecaster import Forecaster
from spatspark_fast.models.registry import LoadedForecaster, load_forecaster
from spatspark_fast.scores.defaults import FSS_SCALES, THRESHOLDS
from spatspark_fast.scores.nowcast import NowcastScores

__all__ = ["Evaluation", "Kept", "ScoringOptions", "Windows", "evaluate_forecaster", "evaluate_predictors"]

Region = Literal["observed", "common"]
Windows: TypeAlias = NowcastDataset | SyntheticRadar


@dataclass(frozen=True)
class ScoringOptions:
    """Say what is scored, and where.

    Args:
        thresholds: rates in mm/h above which a pixel is wet.
        fss_scales: sides in pixels of the neighbourhoods of the fractions skill score; none leaves it out.
        spectrum: compute power spectra.
        region: "observed" scores every pixel with data; where a method says nothing it says dry. "common" scores
            only the pixels of which every method says something.
        steps: frames to forecast and score; None = as many as all predictors and the file have.
        batch_size: windows forecast at once.
        max_windows: score only so many, spread evenly over the file; None = all.
        device: where models run and scores add up.
    """

    thresholds: Sequence[float] = THRESHOLDS
    fss_scales: Sequence[int] = FSS_SCALES
    spectrum: bool = True
    region: Region = "observed"
    steps: int | None = None
    batch_size: int = 4
    max_windows: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raise UserError for numbers below 1 and regions that there are not."""
        for name in ("steps", "batch_size", "max_windows"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (value is not None or name == "batch_size"):
                raise UserError(f"{name} is {value!r}: give a whole number of at least 1")
        check_choice("region", self.region, Region)


@dataclass(frozen=True)
class Kept:
    """Hold one window for a picture: ``now`` ``(H, W)``, ``observed`` and each forecast ``(L, H, W)``, mm/h."""

    index: int
    now: Tensor
    observed: Tensor
    forecasts: dict[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Hold the scores of each predictor by name (see `NowcastScores.compute`), and the windows kept."""

    scores: dict[str, dict[str, Any]]
    kept: list[Kept] = field(default_factory=list)


def evaluate_forecaster(
    model: Forecaster | LoadedForecaster | str | Path,
    data: Windows | str | Path,
    *,
    split: str | None = None,
    scale: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score one model on the windows of a file; return plain numbers, see `NowcastScores.compute`.

    ``model`` is a checkpoint of `finetune`, or a model with ``scale``, the mm per 5 min of its data value 1 (default:
    that of the data). It is put into evaluation mode, and back. ``data`` is a file, of which the ``split`` "test" is
    read unless another is named, or a data set, whose images are taken whole, without augmentation. ``options`` are
    those of `ScoringOptions`. Raises UserError (a ValueError) for what cannot be read or scored, TypeError for what is
    no model, no data or no option::

        scores = evaluate_forecaster(model, "knmi.h5", split="test", fss_scales=(), spectrum=False)
        scores["all"]["pmse"], scores["all"]["csi@0.5"], scores["by_lead_time"]["csi@0.5"][11]
    """
    options["device"] = choose_device(options.get("device", "cpu"))
    settings = ScoringOptions(**options)
    if scale is not None and not isinstance(model, Forecaster):
        raise UserError(f"scale is {scale}, but a checkpoint knows its own: leave it out")
    if scale is not None and not 0 < scale < math.inf:
        raise UserError(f"scale is {scale}: give the mm per 5 min of data value 1, above 0")
    if isinstance(model, str | Path):
        model = load_forecaster(model, settings.device)
    if not isinstance(model, Forecaster | LoadedForecaster):
        raise TypeError(f"model is a {type(model).__name__}: give the path of a checkpoint, or a Forecaster")
    windows = _open_windows(data, split, model.in_length)
    if isinstance(model, Forecaster):
        lengths = model.in_length, model.out_length
        loaded = LoadedForecaster(
            model, type(model).__name__, *lengths, float(windows.scale) if scale is None else scale, model.multiple
        )
    else:
        loaded = model
    modes = {module: module.training for module in loaded.model.modules()}
    loaded.model.eval()
    try:
        return evaluate_predictors([ModelPredictor(loaded, "model")], windows, settings).scores["model"]
    finally:
        for module, training in modes.items():
            module.training = training


def evaluate_predictors(
    predictors: Sequence[Predictor],
    windows: Windows,
    options: ScoringOptions | None = None,
    keep: Sequence[int] = (),
    track: Track = silently,
) -> Evaluation:
    """Score several predictors on the same pixels of the same windows.

    ``windows`` must give at least as many past frames as any predictor needs; each takes the newest. ``keep`` names
    windows (by index) of which everything is returned, for pictures. ``track`` may show progress.

    Raises:
        UserError: no window, or too few frames in one.
    """
    options = options or ScoringOptions()
    leads = _lead_times(predictors, windows, options)
    meters = {predictor.name: _Meter(windows, leads, options) for predictor in predictors}
    if len(meters) < len(predictors):
        raise UserError(f"names of models must differ, got {', '.join(p.name for p in predictors)}")
    kept: list[Kept] = []
    chosen = spread(len(windows), options.max_windows or len(windows))
    batches = [chosen[start : start + options.batch_size] for start in range(0, len(chosen), options.batch_size)]
    for indices in track(batches, "scoring", len(batches)):
        past, future = _read(windows, indices, leads, options.device)
        forecasts = {p.name: meters[p.name].forecast(p, past, leads) for p in predictors}
        target = future
        if options.region == "common":
            known = torch.stack([torch.isfinite(forecast) for forecast in forecasts.values()]).all(0)
            target = torch.where(known, future, torch.nan)
        for name, forecast in forecasts.items():
            meters[name].update(forecast, future, target)
        for row, index in enumerate(indices):
            if index in keep:
                made = {name: forecast[row].cpu() for name, forecast in forecasts.items()}
                kept.append(Kept(index, past[row, -1].cpu(), future[row].cpu(), made))
    scores = {name: meter.compute() for name, meter in meters.items()}
    if not any(found["pixels"] for found in scores.values()):
        least = "that has data and of which every method says something; try --region observed"
        what = "with data" if options.region == "observed" else least
        raise UserError(f"nothing to score: in {len(chosen)} windows there is no pixel {what}")
    return Evaluation(scores, kept)


def spread(length: int, count: int) -> list[int]:
    """Return ``count`` indices spread evenly over ``length``, each once; all where there are not more."""
    count = min(count, length)
    if count == 1:
        return [length // 2]
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


class _Meter:
    """Time and score one predictor."""

    def __init__(self, windows: Windows, leads: int, options: ScoringOptions) -> None:
        interval = float(_attribute(windows, "interval_minutes", units.FRAME_MINUTES))
        self._scores = NowcastScores(
            leads,
            windows.image_size,
            options.thresholds,
            options.fss_scales,
            options.spectrum,
            float(windows.scale),
            interval,
        ).to(options.device)
        self._seconds = 0.0
        self._silent = torch.zeros(leads, dtype=torch.float64, device=options.device)
        self._pixels = torch.zeros(leads, dtype=torch.float64, device=options.device)

    def forecast(self, predictor: Predictor, past: Tensor, leads: int) -> Tensor:
        start = time.perf_counter()
        made = predictor.predict(past[:, -predictor.in_length :], leads)
        if made.is_cuda:
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - start
        return made

    def update(self, forecast: Tensor, observed: Tensor, target: Tensor) -> None:
        """Score a forecast on the pixels of ``target``; count where it is silent among those ``observed``."""
        seen = torch.isfinite(observed)
        self._pixels += seen.sum((0, 2, 3))
        self._silent += (seen & torch.isnan(forecast)).sum((0, 2, 3))
        self._scores.update(forecast.nan_to_num(nan=0.0), target)

    def compute(self) -> dict[str, Any]:
        found = self._scores.compute()
        found["seconds_per_window"] = self._seconds / max(self._scores.windows, 1)
        found["silent_share"] = (self._silent / self._pixels).tolist()  # NaN where nothing was observed
        return found


def _open_windows(data: Windows | str | Path, split: str | None, in_length: int) -> Windows:
    """Open a file, or a data set again, such that images are whole and pixels without data are known."""
    if isinstance(data, str | Path):
        return NowcastDataset(data, split or "test", input_length=in_length, include_valid=True)
    if not isinstance(data, Windows):
        raise TypeError(f"data is a {type(data).__name__}: give the path of a file, or a data set of windows")
    if split is not None and split != getattr(data, "split", None):
        raise UserError(f"split is {split!r}, but the data set is open already: leave it out")
    if isinstance(data, SyntheticRadar):
        return data
    return NowcastDataset(data.path, data.split, data.input_length, data.output_length, include_valid=True)


def _lead_times(predictors: Sequence[Predictor], windows: Windows, options: ScoringOptions) -> int:
    if not predictors:
        raise UserError("nothing to score: give a --checkpoint or one of the --baselines")
    if len(windows) == 0:
        raise UserError("nothing to score: there is no window")
    for predictor in predictors:
        if predictor.in_length > windows.input_length:
            raise UserError(
                f"{predictor.name} reads {predictor.in_length} frames, where a window has {windows.input_length} "
                "before the present"
            )
    limits = [p.max_steps for p in predictors if p.max_steps is not None]
    most = min([windows.output_length, *limits])
    if most < 1:
        raise UserError(
            f"the windows hold no frame after the {windows.input_length} of the input, so there is nothing to "
            "compare a forecast with; python -m spatspark_fast.forecast needs none"
        )
    if options.steps is not None and not 1 <= options.steps <= most:
        raise UserError(f"--steps {options.steps} must be from 1 to {most}: the models and the file have that")
    return options.steps or most


def _read(windows: Windows, indices: Sequence[int], leads: int, device: str) -> tuple[Tensor, Tensor]:
    """Return past and future of some windows, ``(B, T, H, W)`` mm/h, NaN where there is no data."""
    past, future = [], []
    for index in indices:
        item = windows[index]
        frames = units.mm_per_hour(torch.cat((item["input"], item["target"])), float(windows.scale))
        if "valid" in item:
            frames = frames.masked_fill(~item["valid"], torch.nan)
        past.append(frames[: windows.input_length])
        future.append(frames[windows.input_length : windows.input_length + leads])
    return torch.stack(past).to(device), torch.stack(future).to(device)


def _attribute(windows: Windows, name: str, default: Any) -> Any:
    attributes = getattr(windows, "attributes", {})
    return attributes.get(name, default) if isinstance(attributes, dict) else default
