"""The rule table of :func:`patchsparse.sparsify`: what becomes of a type, and why some are refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..functional.conv import enlarging_stencil
from ..geometry import Stencil, pair
from . import fused
from . import modules as patch_nn
from .modules import PatchModule, stencil_of

__all__ = ["Rule", "find_rule", "qualified_name"]


def accept(module: nn.Module) -> str | None:
    """Refuse nothing."""
    return None


def always(module: nn.Module) -> bool:
    """Concern every instance."""
    return True


@dataclass(frozen=True)
class Rule:
    """What to do with a module type.

    Attributes:
        make: the class that adopts the module, or its name in ``modules_timm``, or in ``fused_timm`` as ``fused.NAME``;
            None leaves the module as it is.
        refuse: returns the reason why a given instance cannot be equal to dense-and-mask, or None.
        whole: the module answers for its children, which see one row per image; they are not visited.
        optional: adopting only saves time; a module that cannot be adopted stays as it is.
        concerns: whether to adopt a given instance; others stay as they are.
    """

    make: type[PatchModule] | str | None = None
    refuse: Callable[[Any], str | None] = accept
    whole: bool = False
    optional: bool = False
    concerns: Callable[[Any], bool] = always

    def target(self) -> type[PatchModule] | None:
        """Return the class to adopt with."""
        if isinstance(self.make, str):
            file, _, name = self.make.rpartition(".")
            return getattr(importlib.import_module(f".{file or 'modules'}_timm", __package__), name)
        return self.make


_POINTWISE = Rule(patch_nn.PatchPointwiseConv2d)


def _pair_of(value: Any) -> tuple[int, int]:
    return pair(tuple(value) if isinstance(value, (tuple, list)) else value, "output_padding")


def _misaligned(stencil: Stencil, ceil_mode: bool = False) -> str | None:
    try:
        stencil.check(stencil.stride, "its stencil", ceil_mode)
    except ValueError as error:
        return str(error)
    return None


def _conv(module: nn.Conv2d) -> str | None:
    try:
        stencil = stencil_of(module)
    except ValueError as error:
        return str(error)
    if module.padding_mode != "zeros" and max(stencil.padding) > 0:
        return f"padding_mode={module.padding_mode!r} reads pixels that may be masked; use padding_mode='zeros'"
    return _misaligned(stencil)


def _conv_transpose(module: nn.ConvTranspose2d) -> str | None:
    w = stencil_of(module)
    try:
        enlarging_stencil(w.kernel, w.stride, w.padding, _pair_of(module.output_padding), w.dilation, (1, 1))
    except ValueError as error:
        return str(error)
    return None


def _max_pool(module: nn.MaxPool2d) -> str | None:
    if module.return_indices:
        return "return_indices=True gives positions in the whole image; set it to False"
    return _misaligned(stencil_of(module), module.ceil_mode)


def _avg_pool(module: nn.AvgPool2d) -> str | None:
    stencil = stencil_of(module)
    return _misaligned(stencil) or _misaligned(stencil, module.ceil_mode)


def _adaptive(module: Any) -> str | None:
    if module.output_size not in (1, (1, 1), [1, 1]):
        return f"output_size={module.output_size} mixes patches; only global pooling (1) has a packed form"
    return None


def _fast_pool(module: Any) -> str | None:
    return None if tuple(module.dim) == (2, 3) else "pooling of NHWC input is not supported; use input_fmt='NCHW'"


def _layer_norm(module: Any) -> str | None:
    if len(module.normalized_shape) != 1:
        return f"normalized_shape={tuple(module.normalized_shape)} spans pixels; use a norm over channels"
    return None


def _instance_norm(module: nn.InstanceNorm2d) -> str | None:
    return "running statistics are not supported; use the default" if module.track_running_stats else None


def _channel_dim(module: Any) -> str | None:
    if module.dim in (1, -3):
        return None
    return f"dim={module.dim} is not the channel dimension; use dim=1"


def _upsample(module: nn.Upsample) -> str | None:
    factor = module.scale_factor
    factors = factor if isinstance(factor, tuple) else (factor,)
    if module.mode != "nearest" or any(f is None or f != int(f) for f in factors):
        return f"mode={module.mode!r}, scale_factor={factor} is not local; use 'nearest', whole factor"
    return None


def _squeeze_excite(module: Any) -> str | None:
    return "add_maxpool=True is not supported; use the mean only" if module.add_maxpool else None


def _blur(module: Any) -> str | None:
    if module.pad_mode not in ("constant", "zeros"):
        return f"pad_mode={module.pad_mode!r} reads pixels that may be masked; use aa_layer='blurpc'"
    size, stride, padding = module.filt_size, module.stride, module.padding[0]
    return _misaligned(Stencil((size, size), (stride, stride), (padding, padding)))


def _because(reason: str) -> Rule:
    return Rule(refuse=lambda module: reason)


def _torch_rules() -> Iterator[tuple[str, Rule]]:
    activations = (
        "Threshold ReLU RReLU Hardtanh ReLU6 Sigmoid Hardsigmoid Tanh SiLU Mish Hardswish ELU CELU SELU GELU "
        "Hardshrink LeakyReLU LogSigmoid Softplus Softshrink PReLU Softsign Tanhshrink Softmax2d"
    )
    stay = (
        "linear.Identity dropout.Dropout dropout.AlphaDropout batchnorm.SyncBatchNorm "
        "normalization.LocalResponseNorm pixelshuffle.PixelShuffle pixelshuffle.PixelUnshuffle "
        "channelshuffle.ChannelShuffle container.ModuleList container.ModuleDict "
        "container.ParameterList container.ParameterDict flatten.Flatten"
    )
    rules: dict[str, Rule] = {f"activation.{name}": Rule() for name in activations.split()}
    rules |= dict.fromkeys(stay.split(), Rule())
    rules |= dict.fromkeys(
        ("activation.GLU", "activation.Softmax", "activation.LogSoftmax", "activation.Softmin"),
        Rule(refuse=_channel_dim),
    )
    rules |= {
        "linear.Linear": Rule(patch_nn.PatchLinear, optional=True),
        "conv.Conv2d": Rule(patch_nn.PatchConv2d, _conv),
        "conv.ConvTranspose2d": Rule(patch_nn.PatchConvTranspose2d, _conv_transpose),
        "pooling.MaxPool2d": Rule(patch_nn.PatchMaxPool2d, _max_pool),
        "pooling.AvgPool2d": Rule(patch_nn.PatchAvgPool2d, _avg_pool),
        "pooling.AdaptiveAvgPool2d": Rule(patch_nn.PatchAdaptiveAvgPool2d, _adaptive),
        "normalization.GroupNorm": Rule(patch_nn.PatchGroupNorm),
        "normalization.LayerNorm": Rule(refuse=_layer_norm),
        "normalization.RMSNorm": Rule(refuse=_layer_norm),
        "instancenorm.InstanceNorm2d": Rule(patch_nn.PatchInstanceNorm2d, _instance_norm),
        "dropout.Dropout2d": Rule(patch_nn.PatchDropout2d),
        "upsampling.Upsample": Rule(refuse=_upsample),
        "upsampling.UpsamplingNearest2d": Rule(refuse=_upsample),
        "activation.MultiheadAttention": _because("attention mixes all pixels of an image; it has no packed form here"),
    }
    padding = _because("padding in a layer of its own is not aligned with the patches; give it to the convolution")
    for name in ("ZeroPad2d", "ConstantPad2d", "ReflectionPad2d", "ReplicationPad2d", "CircularPad2d"):
        rules[f"padding.{name}"] = padding
    for name, rule in rules.items():
        yield f"torch.nn.modules.{name}", rule


def _timm_stay() -> dict[str, Rule]:
    """Return the rules of modules that look at one pixel, and of those that can never be equal."""
    layers = (
        "norm_act.SyncBatchNormAct norm_act.FrozenBatchNormAct2d layer_scale.LayerScale",
        "layer_scale.LayerScale2d linear.Linear space_to_depth.SpaceToDepth space_to_depth.DepthToSpace",
        "adaptive_avgmax_pool.SelectAdaptivePool2d",
    )
    models = "fastvit.LayerScale2d selecsls.SelectSeq hrnet.SequentialList metaformer.Scale"
    activations = "Swish Mish Sigmoid Tanh HardSwish HardSigmoid HardMish PReLU GELU GELUTanh QuickGELU"
    norms = "LayerNorm LayerNormFp32 LayerNorm2d LayerNorm2dFp32 LayerNormExp2d"
    other_norms = "RmsNorm RmsNormFp32 RmsNorm2d RmsNorm2dFp32 SimpleNorm SimpleNormFp32 SimpleNorm2d SimpleNorm2dFp32"
    norm_acts = "LayerNormAct LayerNormActFp32 LayerNormAct2d LayerNormAct2dFp32 RmsNormAct RmsNormAct2d"
    same = "conv2d_same.Conv2dSame std_conv.StdConv2dSame std_conv.ScaledStdConv2dSame"
    same_pools = "pool2d_same.AvgPool2dSame pool2d_same.MaxPool2dSame"
    channels = Rule(refuse=_layer_norm)
    dynamic = _because(
        "TensorFlow's dynamic same padding depends on the size of the image; use the variant without 'tf_'"
    )
    groups = (
        ("layers.", " ".join(layers), Rule()),
        ("models.", models, Rule()),
        ("layers.activations.", activations, Rule()),
        ("layers.activations_me.", "SwishMe MishMe HardSigmoidMe HardSwishMe HardMishMe", Rule()),
        ("layers.norm.", f"{norms} {other_norms}", channels),
        ("layers.norm_act.", norm_acts, channels),
        ("layers.", f"{same} {same_pools}", dynamic),
    )
    return {f"{prefix}{name}": rule for prefix, names, rule in groups for name in names.split()}


def _timm_rules() -> Iterator[tuple[str, Rule]]:
    rules = _timm_stay()
    excite = Rule("PatchSqueezeExcite", _squeeze_excite, whole=True)
    effective = Rule("PatchEffectiveSqueezeExcite", _squeeze_excite, whole=True)
    rules |= {
        "layers.drop.DropPath": Rule("PatchDropPath"),
        "layers.drop.DropBlock2d": _because("DropBlock draws squares across patches; build the model without it"),
        "layers.squeeze_excite.SEModule": excite,
        "layers.squeeze_excite.EffectiveSEModule": effective,
        "models._efficientnet_blocks.SqueezeExcite": Rule("PatchEfficientNetSqueezeExcite", whole=True),
        "layers.eca.EcaModule": Rule("PatchEca", whole=True),
        "layers.eca.CecaModule": Rule("PatchCeca", whole=True),
        "layers.grn.GlobalResponseNorm": Rule("PatchGlobalResponseNorm"),
        "layers.adaptive_avgmax_pool.FastAdaptiveAvgPool": Rule("PatchFastAdaptiveAvgPool", _fast_pool),
        "layers.norm.GroupNorm": Rule("PatchGroupNormTimm"),
        "layers.norm.GroupNorm1": Rule("PatchGroupNorm1Timm"),
        "layers.norm_act.GroupNormAct": Rule("PatchGroupNormAct"),
        "layers.norm_act.GroupNorm1Act": Rule("PatchGroupNorm1Act"),
        "layers.std_conv.StdConv2d": Rule("PatchStdConv2d", _conv),
        "layers.std_conv.ScaledStdConv2d": Rule("PatchScaledStdConv2d", _conv),
        "layers.blur_pool.BlurPool2d": Rule("PatchBlurPool2d", _blur),
    }
    for name, rule in rules.items():
        yield f"timm.{name}", rule
    yield "torchvision.ops.misc.FrozenBatchNorm2d", Rule()


def _fused_rules() -> Iterator[tuple[str, Rule]]:
    """Return the rules of norms and of what calls them: of these very types, since a derived one may call otherwise."""
    makes: dict[str, type[PatchModule] | str] = {
        "torch.nn.modules.batchnorm.BatchNorm2d": fused.PatchBatchNorm2d,
        "torch.nn.modules.container.Sequential": fused.PatchSequential,
        "timm.layers.norm_act.BatchNormAct2d": "fused.PatchBatchNormAct2d",
        "timm.models._features.FeatureDictNet": "fused.PatchFeatureDictNet",
        "timm.models._features.FeatureListNet": "fused.PatchFeatureListNet",
        "timm.models.dla.DlaBasic": "fused.PatchDlaBasic",
        "timm.models.dla.DlaBottleneck": "fused.PatchDlaBottleneck",
        "timm.models.regnet.Bottleneck": "fused.PatchRegNetBottleneck",
        "timm.models.resnet.BasicBlock": "fused.PatchBasicBlock",
        "timm.models.resnet.Bottleneck": "fused.PatchBottleneck",
    }
    for name, make in makes.items():
        yield name, Rule(make, optional=True, concerns=partial(_is_exactly, name))


def _is_exactly(name: str, module: nn.Module) -> bool:
    if qualified_name(type(module)) != name:
        return False
    return type(module) is not nn.Sequential or fused.holds_pair(module)


_LAZY = _because("it has no parameters yet; run a batch through the model first, then sparsify it")
_TABLE = dict([*_torch_rules(), *_timm_rules(), *_fused_rules()])


def qualified_name(kind: type) -> str:
    """Return ``module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule for ``module``: of its type, or of a base whose ``forward`` it inherits unchanged.

    A lazy module is refused until its first batch has made its parameters, and has given it the type that it will have.
    """
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return _LAZY
    for base in kind.__mro__:
        rule = _TABLE.get(qualified_name(base))
        if rule is not None:
            inherited = all(
                getattr(kind, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward")
            )
            if not inherited and kind is not base:
                return None
            return _POINTWISE if _pointwise(module) else rule
    return None


def _pointwise(module: nn.Module) -> bool:
    """Whether a convolution is 1x1 without stride: it then needs no grid, and also takes one pixel per image."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
    )
