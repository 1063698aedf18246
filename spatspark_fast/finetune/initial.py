"""Weights to start finetuning from: of a pretraining, of an earlier finetuning, or of an encoder alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import load_plain
from spatspark_fast.common.options import check_types
from spatspark_fast.finetune.config import DataConfig, ModelConfig
from spatspark_fast.models.backbones import load_encoder
from spatspark_fast.models.forecaster import Forecaster
from spatspark_fast.models.registry import AVERAGE_PREFIX, DESCRIPTION, forecaster_weights
from spatspark_fast.models.spatspark import HEAD, SpatSpark
from spatspark_fast.models.weights import check_weights, read_weights
from spatspark_fast.training.options import ModelOptions

__all__ = ["Initial", "read_initial"]

SPARK_PREFIX = "spark."
# Options of pretraining that a finetuned model has to share, by their place in the configuration.
SHARED = tuple(option.name for option in fields(ModelOptions))
FORECASTER = (*SHARED, "kind", "translation", "output_norm", "base_width")


@dataclass
class Initial:
    """Hold weights and what they demand of the options.

    ``demands`` maps options such as ``model.encoder`` to values; ``what`` is "pretrain", "finetune" or "encoder".
    """

    path: Path
    what: str
    demands: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def fill(self, model: Forecaster) -> list[str]:
        """Put the weights into a model; return the names of those in encoder and decoder that stay random.

        Raises UserError if they do not fit.
        """
        if self.what == "finetune":
            return _fill_forecaster(model, self.weights, self.path)
        if not isinstance(model, SpatSpark):
            raise UserError(f"--init {self.path} fills encoder and decoder of SpaT-SparK, not a {type(model).__name__}")
        if self.what == "encoder":
            load_encoder(model.encoder, self.path)
            return [name for name in model.state_dict() if not name.startswith(("encoder.", "translation."))]
        try:
            return model.load_pretrained(self.weights)
        except UserError as error:
            raise UserError(f"--init {self.path}: {error}") from None


def read_initial(path: str | Path) -> Initial:
    """Read a checkpoint of `pretrain` or `finetune`, or an ``encoder.safetensors``.

    Where a run kept an average of its weights, that is taken. Raises UserError if the file is missing, damaged, or
    something else.
    """
    path = Path(path)
    if not path.is_file():
        remedy = "give a checkpoint of pretrain, or none to train from scratch"
        raise UserError(f"--init {path}: there is no such file; {remedy}")
    if path.suffix == ".safetensors":
        return _read_encoder(path)
    checkpoint = load_plain(path, "pretrain or finetune")
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or "state_dict" not in checkpoint:
        raise UserError(f"--init {path} is no checkpoint of pretrain or finetune: it lacks options or weights")
    state = check_weights(checkpoint["state_dict"], path)
    what, names = ("finetune", FORECASTER) if DESCRIPTION in checkpoint else ("pretrain", SHARED)
    try:
        model = _known(config.get("model"), ModelConfig, names)
        data = _known(config.get("data"), DataConfig, ["input_length"])
    except UserError as error:
        raise UserError(f"--init {path} is damaged, or of another version: {error}") from None
    # Checkpoints from before there was a choice saw data values as they are.
    demands = {f"model.{name}": value for name, value in ({"input_scaling": "none"} | model).items()}
    weights = forecaster_weights(checkpoint) if what == "finetune" else _pretrained_weights(state)
    if not weights or "input_length" not in data:
        raise UserError(f"--init {path} is no checkpoint of pretrain or finetune: it holds none of their weights")
    return Initial(path, what, demands | {"data.input_length": data["input_length"]}, weights)


def _known(values: object, group: type, names: Iterable[str]) -> dict[str, Any]:
    """Return the options with these names, of whatever version; raise UserError for a value of another type."""
    chosen = {name: value for name, value in values.items() if name in names} if isinstance(values, dict) else values
    return check_types(chosen or {}, get_type_hints(group))


def _read_encoder(path: Path) -> Initial:
    try:
        metadata, _ = read_weights(path)
    except UserError as error:
        raise UserError(f"--init: {error}") from None
    architecture = metadata.get("architecture")
    demands = {"model.encoder": architecture} if architecture else {}
    return Initial(path, "encoder", demands | {"model.input_scaling": metadata.get("input_scaling", "none")})


def _pretrained_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = AVERAGE_PREFIX if any(key.startswith(AVERAGE_PREFIX) for key in state) else SPARK_PREFIX
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _fill_forecaster(model: Forecaster, weights: dict[str, Tensor], path: Path) -> list[str]:
    """Load all weights; what follows from the number of lead times may differ and stays random."""
    own = model.state_dict()
    kept = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    by_lead_time = (HEAD, "head.", "translation.")
    odd = [name for name in kept if not name.startswith(by_lead_time)]
    if odd or set(weights) - set(own):
        name = (odd or sorted(set(weights) - set(own)))[0]
        raise UserError(f"--init {path} is of another model: {name} does not fit; leave --model options out")
    model.load_state_dict({name: value for name, value in weights.items() if name not in kept}, strict=False)
    return kept
