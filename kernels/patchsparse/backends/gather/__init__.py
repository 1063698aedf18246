"""The ``gather`` engine: pure PyTorch, any device and dtype; the readable definition of every operation.

Convolution has two methods, chosen by :func:`method` from measurement (``benchmarks/test_conv.py``):

- *halo*: gather each patch with its halo into a tile, then run PyTorch's own dense operation on the tiles.
- *rows*: for each kernel tap gather the rows whose neighbour is active, multiply them by the tap's weights, and sum
  the products of each output. Inactive neighbours cost nothing; deep stages go beyond 1 / (visible share).

Every scatter is written as a gather through inverse rows: sums are deterministic and faster than ``index_add``.
"""

from __future__ import annotations

import torch

from ...geometry import Call
from .conv import conv2d, conv2d_dgrad, conv2d_gradients, conv2d_wgrad, method, method_of
from .halo import halo, halo_adjoint
from .local import (
    image_conv2d,
    image_conv_transpose2d,
    linear,
    local_avg_pool2d,
    local_conv2d,
    local_max_pool2d,
    product,
)
from .norm import (
    batch_norm_act,
    batch_norm_act_grad,
    batch_norm_moments,
    batch_norm_unpack,
    batch_norm_unpack_grad,
)
from .pool import avg_pool2d, avg_pool2d_grad, max_pool2d, max_pool2d_grad

__all__ = [
    "avg_pool2d",
    "avg_pool2d_grad",
    "batch_norm_act",
    "batch_norm_act_grad",
    "batch_norm_moments",
    "batch_norm_unpack",
    "batch_norm_unpack_grad",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_gradients",
    "conv2d_wgrad",
    "halo",
    "halo_adjoint",
    "how",
    "image_conv2d",
    "image_conv_transpose2d",
    "linear",
    "local_avg_pool2d",
    "local_conv2d",
    "local_max_pool2d",
    "max_pool2d",
    "max_pool2d_grad",
    "method",
    "product",
    "why_not",
    "why_unusable",
]


HOW = {
    "product": "one product of matrices by PyTorch",
    "local_conv2d": "PyTorch's conv2d on the packed tensor",
    "local_max_pool2d": "PyTorch's max_pool2d on the packed tensor",
    "local_avg_pool2d": "PyTorch's avg_pool2d on the packed tensor",
    "max_pool2d": "PyTorch's max_pool2d on tiles with halo",
    "avg_pool2d": "PyTorch's avg_pool2d on tiles with halo",
    "batch_norm_act": "PyTorch, one step after the other",
    "batch_norm_unpack": "PyTorch, one step after the other",
    "image_conv2d": "PyTorch's conv2d on whole images",
    "image_conv_transpose2d": "PyTorch's conv_transpose2d on whole images",
    "image_grid": "no grid: the module runs dense, by PyTorch",
}


def why_unusable(device: str, dtype: torch.dtype) -> str | None:
    """Return why this engine cannot run on a device and dtype: it always can."""
    return None


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take the call: it always can."""
    return None


def how(call: Call) -> str:
    """Return the method by which this engine computes a call, in a few words."""
    if call.operation.startswith("conv2d"):
        return f"method {method_of(call)}"
    return HOW.get(call.operation, "PyTorch")
