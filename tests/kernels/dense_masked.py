"""Dense-and-mask, written out for any timm convnet: the independent reference of the parity tests.

Plain PyTorch; nothing of patchsparse is imported. Each module of a deep copy gets a forward of its own:
spatial ones mask what they read and what they write, norms and poolings see the active pixels only (SparK,
arXiv 2301.03580).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.eca import EcaModule
from timm.layers.grn import GlobalResponseNorm
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn


class DenseMasked(nn.Module):
    """Run a deep copy of ``model`` on whole images with every inactive pixel held at zero.

    ``forward(x, active)`` takes ``(B, C, H, W)`` and ``(B, Gh, Gw)`` bool. Parameter names are those of
    ``model`` below ``model.``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.active = torch.ones(1, 1, 1, dtype=torch.bool)
        for module in self.model.modules():
            forward = self._forward_of(module)
            if forward is not None:
                module.forward = MethodType(forward, module)  # type: ignore[method-assign]

    def forward(self, x: Tensor, active: Tensor) -> Any:
        self.active = active
        return self.model(x * self.map_of(x).to(x.dtype))

    def map_of(self, x: Tensor) -> Tensor:
        """Return the active map at the resolution of ``x``, ``(B, 1, H, W)`` bool."""
        rows, columns = self.active.shape[1:]
        tall = self.active.repeat_interleave(x.shape[2] // rows, 1)
        return tall.repeat_interleave(x.shape[3] // columns, 2).unsqueeze(1)

    def _forward_of(self, module: nn.Module) -> Callable[..., Tensor] | None:
        original = type(module).forward
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d)):
            return partial(_spatial, self, original)
        if isinstance(module, nn.BatchNorm2d):
            return partial(_batch_norm, self)
        table: dict[type, Callable[..., Tensor]] = {
            nn.GroupNorm: _group_norm,
            nn.InstanceNorm2d: _instance_norm,
            SEModule: _squeeze_excite,
            SqueezeExcite: _squeeze_excite,
            EffectiveSEModule: _squeeze_excite,
            EcaModule: _eca,
            GlobalResponseNorm: _response_norm,
            DropPath: _drop_path,
            nn.AdaptiveAvgPool2d: _global_pool,
        }
        for kind, forward in table.items():
            if isinstance(module, kind):
                return partial(forward, self)
        return None


def right_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return ``F.conv2d`` without oneDNN's faults: in gradients of strided 1x1 ones, and of dilated ones in halves."""
    if weight.shape[2:] == (1, 1) and padding in (0, (0, 0)):
        rows, columns = (stride, stride) if isinstance(stride, int) else stride
        return F.conv2d(x[..., ::rows, ::columns], weight, bias, groups=groups)
    if dilation not in (1, (1, 1)) and x.dtype in (torch.bfloat16, torch.float16):
        wide = (x.float(), weight.float(), None if bias is None else bias.float())
        return F.conv2d(*wide, stride, padding, dilation, groups).to(x.dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


# `MethodType(partial(f, ref), module)(x)` calls f(ref, module, x).


def _spatial(ref: DenseMasked, original: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    if x.shape[2:] == (1, 1) and ref.active.shape[1:] != (1, 1):
        return original(module, x)  # one value per image, inside squeeze-and-excite
    seen = torch.where(ref.map_of(x), x, 0)
    if original is nn.Conv2d.forward and not isinstance(module.padding, str) and module.padding_mode == "zeros":
        y = right_conv2d(
            seen, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups
        )
    else:
        y = original(module, seen)
    return torch.where(ref.map_of(y), y, 0)


def _batch_norm(ref: DenseMasked, module: Any, x: Tensor) -> Tensor:
    if x.shape[2:] == (1, 1) and ref.active.shape[1:] != (1, 1):
        return nn.BatchNorm2d.forward(module, x)  # one value per image, inside squeeze-and-excite
    where = ref.map_of(x)[:, 0]
    rows = x.permute(0, 2, 3, 1)[where]
    momentum = module.momentum
    use_batch = module.training or module.running_mean is None
    if module.training and module.track_running_stats:
        module.num_batches_tracked += 1
    rows = F.batch_norm(
        rows,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        use_batch,
        momentum,
        module.eps,
    )
    y = torch.zeros_like(x.permute(0, 2, 3, 1))
    y = y.masked_scatter(where.unsqueeze(-1), rows).permute(0, 3, 1, 2)
    if hasattr(module, "act"):
        y = module.act(module.drop(y))
    return y


def _mean(ref: DenseMasked, x: Tensor) -> Tensor:
    where = ref.map_of(x)
    total = torch.where(where, x, 0).sum((2, 3), keepdim=True)
    return total / where.sum((2, 3), keepdim=True).clamp(min=1)


def _global_pool(ref: DenseMasked, module: Any, x: Tensor) -> Tensor:
    return _mean(ref, x)


def _squeeze_excite(ref: DenseMasked, module: Any, x: Tensor) -> Tensor:
    gate, y = module.gate, _mean(ref, x)
    if hasattr(module, "fc2"):  # SEModule
        y = module.fc2(module.act(module.bn(module.fc1(y))))
    elif hasattr(module, "fc"):  # EffectiveSEModule
        y = module.fc(y)
    else:
        y = module.conv_expand(module.act1(module.conv_reduce(y)))
    return x * gate(y)


def _eca(ref: DenseMasked, module: Any, x: Tensor) -> Tensor:
    y = module.conv(_mean(ref, x)[:, :, 0, 0].unsqueeze(1))
    return x * module.gate(y).transpose(1, 2).unsqueeze(-1)


def _response_norm(ref: DenseMasked, module: Any, x: Tensor) -> Tensor:
    last = module.channel_dim == -1
    nchw = x.permute(0, 3, 1, 2) if last else x
    energy = torch.where(ref.map_of(nchw), nchw, 0).square().sum((2, 3), keepdim=True)
    strength = energy.clamp(min=1e-300).sqrt()
    relative = strength / (strength.mean(1, keepdim=True) + module.eps)
    weight, bias = module.weight.view(1, -1, 1, 1), module.bias.view(1, -1, 1, 1)
    y = nchw + weight * (nchw * relative) + bias
    return y.permute(0, 2, 3, 1) if last else y


def _group_norm(ref: DenseMasked, module: Any, x: Tensor, groups: int = 0) -> Tensor:
    groups = groups or int(module.num_groups)
    where = ref.map_of(x).unsqueeze(1)
    parts = x.unflatten(1, (groups, -1))
    count = where.sum((2, 3, 4), keepdim=True).clamp(min=1) * parts.shape[2]
    mean = torch.where(where, parts, 0).sum((2, 3, 4), keepdim=True) / count
    apart = torch.where(where, parts - mean, 0)
    variance = apart.square().sum((2, 3, 4), keepdim=True) / count
    y = (apart / (variance + module.eps).sqrt()).flatten(1, 2)
    if module.weight is not None:
        y = y * module.weight.view(1, -1, 1, 1) + module.bias.view(1, -1, 1, 1)
    if hasattr(module, "act"):
        y = module.act(module.drop(y))
    return y


def _instance_norm(ref: DenseMasked, module: Any, x: Tensor) -> Tensor:
    return _group_norm(ref, module, x, groups=module.num_features)


def _drop_path(ref: DenseMasked, module: Any, x: Tensor) -> Tensor:
    if not module.training or module.drop_prob == 0:
        return x
    kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - module.drop_prob)
    return x * kept / ((1 - module.drop_prob) if module.scale_by_keep else 1)
