"""Turn a convolutional timm model into a sparse encoder, and give its weights back under timm's names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn

from patchsparse import UnsupportedModuleError, sparsify
from patchsparse.onednn import keep_clear
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.choices import InputScaling
from spatspark_fast.models.geometry import strides_of
from spatspark_fast.models.weights import read_weights, write_weights

__all__ = [
    "KeyLayout",
    "build_dense_encoder",
    "build_encoder",
    "encoder_channels",
    "encoder_state_dict",
    "load_encoder",
    "save_encoder",
]

KeyLayout = Literal["classifier", "features"]


def build_encoder(name: str, in_chans: int, backend: str = "auto", levels: int = 4) -> nn.Module:
    """Build the timm model ``name`` as a sparse encoder of ``in_chans`` frames, randomly initialised.

    The encoder maps a packed ``(N, in_chans, p, p)`` under ``patchsparse.bind``, or a dense ``(B, in_chans,
    H, W)`` without it, to ``levels`` feature maps, shallow to deep, at strides 4, 8, 16, 32. Its parameters
    and state dict are those of the plain timm model::

        timm.create_model(name, in_chans=in_chans, features_only=True)

    Raises UserError for an unknown name (suggesting close ones), for a model without these strides, and for
    one with a module that has no exact sparse counterpart (naming it).
    """
    model = _build_plain(name, in_chans, levels)
    try:
        return sparsify(model, backend=backend)
    except UnsupportedModuleError as error:
        raise UserError(f"encoder {name!r} cannot run on visible patches only: {error}") from error


def build_dense_encoder(name: str, in_chans: int, levels: int = 4) -> nn.Module:
    """Build the plain timm model ``name``: the encoder of `build_encoder` for whole images, with its keys.

    Its convolutions keep clear of what oneDNN gets wrong on a CPU (`patchsparse.onednn`). Raises UserError for an
    unknown name (suggesting close ones) and for a model without these strides.
    """
    return keep_clear(_build_plain(name, in_chans, levels))


def _build_plain(name: str, in_chans: int, levels: int) -> nn.Module:
    if in_chans < 1:
        raise UserError(f"in_chans is the number of input frames and must be at least 1, got {in_chans}")
    indices = _indices_of_strides(name, _create_plain(name, in_chans), strides_of(levels))
    try:
        encoder = timm.create_model(name, in_chans=in_chans, features_only=True, out_indices=indices)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise UserError(f"timm cannot give feature maps of encoder {name!r}: {error}") from error
    if str(getattr(encoder, "output_fmt", "NCHW")).endswith("NHWC"):
        raise UserError(
            f"encoder {name!r} cannot run on visible patches: its feature maps have their channels last; choose a "
            "convolutional one such as resnet18 or convnext_tiny"
        )
    return encoder


def encoder_channels(encoder: nn.Module) -> tuple[int, ...]:
    """Return the channels of the encoder's feature maps, shallow to deep."""
    return tuple(cast(Any, encoder).feature_info.channels())


def encoder_state_dict(encoder: nn.Module, layout: KeyLayout = "classifier") -> dict[str, Tensor]:
    """Return the encoder's weights under timm's names, on the CPU.

    ``layout="features"``: loads strictly into ``timm.create_model(name, in_chans=..., features_only=True)``.
    ``layout="classifier"``: loads into ``timm.create_model(name, in_chans=...)`` with ``strict=False``, where
    only the head stays missing. (timm flattens names in a features-only model: ``stages_0`` for
    ``stages.0``.)
    """
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    if layout == "features":
        return state
    names = _classifier_keys(encoder)
    return {names[key]: value for key, value in state.items()}


def save_encoder(
    encoder: nn.Module, path: str | Path, layout: KeyLayout = "classifier", input_scaling: InputScaling = "none"
) -> None:
    """Write `encoder_state_dict` to a safetensors file.

    Its metadata hold the timm name, what the encoder saw, and a hash by which `load_encoder` finds changed bytes.
    """
    metadata = {"architecture": _timm_name(encoder), "layout": layout, "input_scaling": input_scaling, "format": "pt"}
    write_weights(path, encoder_state_dict(encoder, layout), metadata)


def load_encoder(encoder: nn.Module, path: str | Path) -> None:
    """Load weights written by `save_encoder`, in either layout, into an encoder of the same architecture.

    Raises UserError if the file cannot be read, was changed since it was written, or holds another architecture or
    number of frames.
    """
    _, state = read_weights(path)
    own = encoder.state_dict()
    if not set(own) <= set(state):
        names = _classifier_keys(encoder)
        state = {key: state[name] for key, name in names.items() if name in state}
    _check_fit(own, state, path, _timm_name(encoder))
    encoder.load_state_dict({key: state[key] for key in own})


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path, name: str) -> None:
    missing = [key for key in own if key not in state]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(own)} weights of encoder {name!r}, such as {missing[0]}")
    for key, value in own.items():
        if state[key].shape != value.shape:
            shapes = f"{tuple(state[key].shape)}, the encoder needs {tuple(value.shape)}"
            raise UserError(f"{path} does not fit encoder {name!r}: {key} is {shapes}")


def _create_plain(name: str, in_chans: int) -> nn.Module:
    """Create the plain classifier for its names and shapes only, without memory or random numbers."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
        raise UserError(f"unknown encoder {name!r}: {hint}")
    with torch.device("meta"):
        return timm.create_model(name, in_chans=in_chans)


def _indices_of_strides(name: str, plain: nn.Module, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return for each stride the index of the deepest feature map that timm offers at it."""
    offered = [int(info["reduction"]) for info in list(getattr(plain, "feature_info", []))]
    missing = [stride for stride in strides if stride not in offered]
    if missing:
        have = ", ".join(map(str, sorted(set(offered)))) or "none"
        raise UserError(
            f"encoder {name!r} has no feature map at stride {missing[0]} (it has {have}): "
            f"choose a hierarchical convolutional one such as resnet18 or convnext_tiny"
        )
    return tuple(len(offered) - 1 - offered[::-1].index(stride) for stride in strides)


def _timm_name(encoder: nn.Module) -> str:
    return str(cast(Any, encoder).pretrained_cfg["architecture"])


def _classifier_keys(encoder: nn.Module) -> dict[str, str]:
    """Map each key of the features-only state dict to the key of the plain classifier.

    timm joins the name of a top-level container and of its child by "_", so at most one "_" stands for a ".".
    """
    plain = _create_plain(_timm_name(encoder), in_chans=3).state_dict()
    keys: dict[str, str] = {}
    for key, value in encoder.state_dict().items():
        top, dot, rest = key.partition(".")
        cuts = [place for place, letter in enumerate(top) if letter == "_"]
        candidates = [key, *(f"{top[:cut]}.{top[cut + 1 :]}{dot}{rest}" for cut in cuts)]
        fitting = [name for name in candidates if name in plain and plain[name].ndim == value.ndim]
        if not fitting:
            raise UserError(
                f"weight {key} of encoder {_timm_name(encoder)!r} has no counterpart in the plain timm model"
            )
        keys[key] = fitting[0]
    return keys
