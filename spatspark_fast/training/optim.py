"""Optimisers and their parameter groups."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spatspark_fast.training.adamw import AdamW
from spatspark_fast.training.lamb import Lamb
from spatspark_fast.training.options import OptimOptions

__all__ = ["build_optimizer", "parameter_groups", "set_rates"]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay and those without: 1-D ones and mask tokens.

    A mask token counts as 1-D whatever its shape (``(1, C, 1, 1)`` in SparK).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        token = any(part.startswith("mask_token") for part in name.split("."))
        (plain if parameter.ndim <= 1 or token else decayed).append(parameter)
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False}]
    return [group for group in groups if group["params"]]


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimOptions, lr: float) -> Lamb | AdamW:
    """Build LAMB or AdamW over `parameter_groups`; rates are set anew before each step by `set_rates`."""
    groups = parameter_groups(named)
    betas = (config.betas[0], config.betas[1])
    if config.name == "lamb":
        return Lamb(groups, lr=lr, betas=betas, weight_decay=0.0)
    return AdamW(groups, lr=lr, betas=betas, weight_decay=0.0)


def set_rates(groups: Iterable[dict[str, Any]], lr: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of all groups; groups that do not decay get 0."""
    for group in groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
